"""Ranks along the axes of a mesh, what cannot be divided or split, and the layout of groups and shards on eight ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.mesh import Meshes, mesh_sizes
from tulu_lightning.models.tensor_parallel import check_splits, split
from tulu_lightning.models.weights import own_block

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_sizes_multiply_to_the_world():
    assert mesh_sizes(16, 2, 2) == (2, 4, 2)
    assert mesh_sizes(16, 2, 2).data == 8
    assert mesh_sizes(1, 1, 1) == (1, 1, 1)


@pytest.mark.parametrize(
    ("world", "tensor", "replicas", "message"),
    [
        (6, 4, 1, r"trainer\.strategy: has tensor_parallel 4 and replicas 1, and 6 ranks are not a multiple of 4"),
        (8, 2, 3, r"and 8 ranks are not a multiple of 6\. Use sizes whose product divides 8 \(1, 2, 4, 8\)"),
        (4, 0, 1, r"trainer\.strategy\.init_args\.tensor_parallel: is 0\. Use at least 1"),
        (4, 1, -1, r"trainer\.strategy\.init_args\.replicas: is -1"),
    ],
)
def test_a_world_that_does_not_divide_is_refused(world, tensor, replicas, message):
    with pytest.raises(InputError, match=message):
        mesh_sizes(world, tensor, replicas)


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({}, 3, r"num_attention_heads of m is 4, not a multiple of it"),
        ({}, 4, r"num_key_value_heads of m is 2, not a multiple of it\. Use a number that divides it"),
        ({"lora": Lora()}, 2, "backbone.lora is set: adapters are not split"),
        ({"compile": True}, 2, "backbone.compile is true"),
    ],
)
def test_what_does_not_split_is_refused(settings, ranks, message):
    decoder = LlamaModel(LlamaConfig(**SIZES, **HEADS))
    with pytest.raises(InputError, match=message):
        check_splits(Backbone("m", **settings), decoder, ranks)
    check_splits(Backbone("m"), decoder, 2)


@pytest.fixture(params=range(8))
def rank(request):
    """One of eight ranks, whose collectives do nothing."""
    dist.init_process_group("fake", rank=request.param, world_size=8, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def groups(mesh):
    return [dist.get_process_group_ranks(group) for group in mesh.get_all_groups()]


def meshes_of(tensor, replicas):
    sizes = mesh_sizes(8, tensor, replicas)
    mesh = init_device_mesh("cpu", (sizes.data, sizes.tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    return Meshes(mesh, sizes)


def test_groups_are_neighbours_in_tensor_parallelism_then_in_shards(rank):
    plain = meshes_of(1, 1)
    assert plain.tensor is None
    assert groups(plain.data) == groups(plain.whole) == [list(range(8))]
    both = meshes_of(2, 2)  # replica = rank // 4, shard = rank // 2 % 2, tensor = rank % 2
    assert groups(both.tensor) == [[rank // 2 * 2, rank // 2 * 2 + 1]]
    first = rank // 4 * 4 + rank % 2
    assert groups(both.data) == [[rank % 4, rank % 4 + 4], [first, first + 2]]
    assert groups(both.whole) == [[rank % 4, rank % 4 + 4], list(range(rank // 4 * 4, rank // 4 * 4 + 4))]


@pytest.mark.parametrize("rows", [16, 6, 2])
def test_a_ranks_block_is_where_its_rows_are(rank, rows):
    """Whole numbers 0, 1, ... are split by two, then sharded by FSDP2 over four: a rank finds its own by its block.

    One rank, as PyTorch keeps a mesh's coordinates from one process group to the next; `test_mesh_parity` has the others.
    """
    if rank != 5:
        return
    meshes = meshes_of(2, 1)
    whole = torch.arange(float(rows * 4)).view(rows, 4)
    for dim in (0, 1):
        own = whole.chunk(2, dim)[rank % 2].contiguous()
        module = torch.nn.Linear(4, rows, bias=False)
        module.weight = torch.nn.Parameter(DTensor.from_local(own, meshes.tensor, [Shard(dim)], run_check=False))
        fully_shard(module, mesh=meshes.data)
        assert torch.equal(whole[own_block(module.weight)], module.weight.to_local())


def test_layers_that_are_not_as_llamas_are_not_split(rank):
    if rank:
        return
    mesh = meshes_of(2, 1).tensor
    with pytest.raises(InputError, match="the self_attn of Qwen3Model is not made of k_proj, o_proj, q_proj, v_proj"):
        split(Qwen3Model(Qwen3Config(**SIZES, **HEADS, head_dim=8)), mesh, "m")
