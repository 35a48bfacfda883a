"""What the ranks of `test_mesh_parity` do: train one network on one process and over each mesh, and say how far apart they end.

Run by torchrun: `mesh_ranks.py OUTPUT FOLDER TENSOR,REPLICAS ...`; the first rank writes OUTPUT, a JSON object by mesh.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import _setup_device_mesh
from torch import nn

from tulu_lightning.core.packing import pack
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedReward, PackedValue
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.mesh import Meshes, mesh_sizes
from tulu_lightning.models.quantize import Quantize
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.models.weights import full, plain_weights
from tulu_lightning.stages.optimizer import clip
from tulu_lightning.types import Document, Segment

STEPS, ROWS = 3, 8
CASES = {
    "lm": (PackedLM, {}),
    "bf16": (PackedLM, {"compute_dtype": "bfloat16"}),
    "checkpointed": (PackedLM, {"activation_checkpointing": True}),
    "reward": (PackedReward, {}),
    "value": (PackedValue, {"layers": 1}),
    "lora": (PackedLM, {"lora": Lora(r=4)}),
    "4bit": (PackedLM, {"lora": Lora(r=4), "quantize": Quantize(blocksize=32)}),
    "stored bf16": (PackedLM, {"compute_dtype": "bfloat16", "weights_dtype": "bfloat16"}),
}


def documents(vocabulary):
    """Plain documents and pairs, of which a step has `ROWS`."""
    generator = torch.Generator().manual_seed(0)

    def segment(tokens, parent=-1):
        ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
        return Segment(ids, torch.ones(tokens), parent)

    def document(k):
        sizes = torch.randint(3, 40, (3,), generator=generator).tolist()
        first = segment(sizes[0])
        return Document((first, segment(sizes[1], 0), segment(sizes[2], 0)) if k % 2 else (first,))

    return [[document(k) for k in range(ROWS)] for _ in range(STEPS)]


def strategy(tensor, replicas):
    """The strategy of a mesh, as far as it builds networks."""
    sizes = mesh_sizes(dist.get_world_size(), tensor, replicas)
    own = Fsdp2(tensor, replicas)
    own._device_mesh = _setup_device_mesh(sizes.data, sizes.tensor, dist.get_world_size(), torch.device("cpu"))
    own._meshes = Meshes(own.device_mesh, sizes)
    own.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    own.cluster_environment = SimpleNamespace(local_rank=lambda: dist.get_rank())
    return own


def loss_of(network, packed):
    out = network(packed)
    return -out.logp_N.sum() if hasattr(out, "logp_N") else out.square().sum()


def train(network, steps, rank, ranks):
    """Losses and gradient norms of a few steps, each divided once by its number of rows; clipping is in them."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-2, weight_decay=0.1)
    result = []
    for rows in steps:
        loss = loss_of(network, pack(rows[rank::ranks]))
        (loss * (ranks / len(rows))).backward()
        result.append([float(loss.detach()), clip(trained, 0.5)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return result


def weights(network):
    return {name: full(tensor.detach()).float().clone() for name, tensor in plain_weights(network)}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def ranks_that_see_a_hole(network):
    """How many ranks get a norm that is not finite when one gradient of the last rank holds one number that is not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == dist.get_world_size() - 1:
        next(p.grad.to_local() for p in trained if p.to_local().numel()).view(-1)[0] = float("nan")
    seen = torch.tensor(float(not math.isfinite(clip(trained, 1.0))))
    dist.all_reduce(seen)
    return int(seen)


def compare(case, folder, own, reference):
    """How far a network over a mesh is from the same one on one process: at the start, and after some steps."""
    kind, settings = CASES[case]
    config = Backbone(folder, **settings)
    torch.manual_seed(7)
    network: nn.Module = own.placed(lambda: kind(config, folder), config)
    start, expected_start, expected, numbers = reference
    at_start = weights(network)
    rank, ranks = own.device_mesh["data_parallel"].get_local_rank(), own.meshes.sizes.data
    found = train(network, start, rank, ranks)
    losses = torch.tensor([loss for loss, _ in found])
    dist.all_reduce(losses, group=own.device_mesh["data_parallel"].get_group())
    frozen = [p for p in network.parameters() if not p.requires_grad]
    ended = weights(network)
    return {
        "holes": ranks_that_see_a_hole(network) / dist.get_world_size(),
        "gradients of frozen weights": sum(p.grad is not None for p in frozen),
        "start": apart(at_start, expected_start),
        "end": apart(ended, expected),
        "moved": apart(expected_start, expected),
        "losses": losses.tolist(),
        "expected losses": [loss for loss, _ in numbers],
        "norms": [norm for _, norm in found],
        "expected norms": [norm for _, norm in numbers],
    }


def main(output, folder, cases, *meshes):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    result = {}
    for case in cases.split(","):
        kind, settings = CASES[case]
        config = Backbone(folder, **settings)
        torch.manual_seed(7)
        alone = kind(config, folder)
        start, steps = weights(alone), documents(256)
        numbers = train(alone, steps, 0, 1)
        reference = (steps, start, weights(alone), numbers)
        for mesh in meshes:
            tensor, replicas = map(int, mesh.split(","))
            if tensor > 1 and settings.get("lora"):
                continue
            result[f"{case} {mesh}"] = compare(case, folder, strategy(tensor, replicas), reference)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
