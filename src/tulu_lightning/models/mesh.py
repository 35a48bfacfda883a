"""How the ranks of a run are laid out: replicas of the model, shards of a replica, and tensor parallelism within a shard.

    world = replicas x shards x tensor_parallel

Ranks that follow one another are neighbours in the last of these, then in shards: with 8 ranks a node, tensor_parallel 8
stays inside a node, and so does a replica with `replicas` = number of nodes.
"""

from typing import Any, NamedTuple

from torch.distributed.device_mesh import DeviceMesh

from tulu_lightning.errors import InputError

__all__ = ["Meshes", "Sizes", "mesh_sizes"]

KEY = "trainer.strategy"


class Sizes(NamedTuple):
    """Ranks along each axis of the mesh."""

    replicas: int
    shards: int
    tensor: int

    @property
    def data(self) -> int:
        """Ranks that have different rows."""
        return self.replicas * self.shards


def mesh_sizes(world: int, tensor_parallel: int, replicas: int) -> Sizes:
    """Divide the ranks.

    Args:
        world: number of ranks.
        tensor_parallel: ranks that compute one forward together.
        replicas: whole copies of the model.

    Raises:
        InputError: a size is below 1, or the world is not a multiple of both together.
    """
    for name, size in (("tensor_parallel", tensor_parallel), ("replicas", replicas)):
        if size < 1:
            raise InputError(f"{KEY}.init_args.{name}", f"is {size}", "Use at least 1.")
    together = tensor_parallel * replicas
    if world % together:
        what = f"has tensor_parallel {tensor_parallel} and replicas {replicas}, and {world} ranks are not a multiple of"
        most = [n for n in range(1, world + 1) if world % n == 0]
        remedy = f"Use sizes whose product divides {world} ({', '.join(map(str, most))}), or other numbers of devices and nodes."
        raise InputError(KEY, f"{what} {together}", remedy)
    return Sizes(replicas, world // together, tensor_parallel)


class Meshes:
    """The groups of ranks over which parts of a network are sharded.

    Attributes:
        sizes: of the axes.
        data: over which layers are sharded: [shards], or [replicas, shards], which keeps a copy per replica.
        tensor: over which the matrices of layers are split; None without tensor parallelism.
        whole: over which is sharded what tensor parallelism does not split. Its ranks all have the same numbers there, so
            their gradients are averaged with the others', and no two of them can drift apart.
    """

    def __init__(self, mesh: DeviceMesh, sizes: Sizes) -> None:
        """Make the groups; all ranks at the same time.

        Args:
            mesh: Lightning's, [data_parallel, tensor_parallel].
            sizes: of the axes.
        """
        self.sizes = sizes
        rows, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        if sizes.replicas == 1:
            self.data = rows
            self.whole = mesh._flatten("world") if sizes.tensor > 1 else rows
        else:
            split: Any = mesh._unflatten(0, (sizes.replicas, sizes.shards), ("replicas", "shards"))
            self.data = split["replicas", "shards"]
            if sizes.tensor > 1:
                within = split["shards", "tensor_parallel"]._flatten("replica")
                self.whole = DeviceMesh._concatenate([split["replicas"], within])
            else:
                self.whole = self.data
        self.tensor = tensor if sizes.tensor > 1 else None
