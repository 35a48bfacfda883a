"""What the ranks of `test_build_memory` do: build one network under a mesh, and say how much memory that took at its peak.

Run by torchrun: `build_ranks.py OUTPUT FOLDER TENSOR REPLICAS`; the first rank writes OUTPUT: for each rank [bytes of the
peak above what there was before, bytes of its parameters]. FOLDER may be a name.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import _setup_device_mesh

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.mesh import Meshes, mesh_sizes
from tulu_lightning.models.sharding import Fsdp2


def of_this_process(key):
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(output, folder, tensor, replicas):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    sizes = mesh_sizes(dist.get_world_size(), int(tensor), int(replicas))
    own = Fsdp2(sizes.tensor, sizes.replicas)
    own._device_mesh = _setup_device_mesh(sizes.data, sizes.tensor, dist.get_world_size(), torch.device("cpu"))
    own._meshes = Meshes(own.device_mesh, sizes)
    own.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    own.cluster_environment = SimpleNamespace(local_rank=lambda: dist.get_rank())
    tiny = str(resolve_model("tiny-random-llama"))
    own.placed(lambda: PackedLM(Backbone(tiny), tiny), Backbone(tiny))  # what loads once a process is there now
    folder = folder if Path(folder).is_dir() else str(resolve_model(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = of_this_process("VmRSS")
    network = own.placed(lambda: PackedLM(Backbone(folder), folder), Backbone(folder))
    rise = of_this_process("VmHWM") - before
    held = sum(parameter.to_local().nbytes for parameter in network.parameters())
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, [rise, held])
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(every))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
