"""What is read back out of vLLM's layers, also where several workers have a part each; the layers are stand-ins."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tulu_lightning.rollout.held_weights import chosen_columns, columns_of, held

HIDDEN, HEADS, WIDTH, FEED, WORDS = 48, 6, 8, 64, 40
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Method:
    def apply(self, module, x, bias=None):
        return x @ module.weight.T


class LinearBase(nn.Module):
    def __init__(self, whole, workers, rank):
        super().__init__()
        self.quant_method, self.tp_size, self.tp_rank = Method(), workers, rank
        self.output_sizes = [len(part) for part in whole]
        self.output_size, self.input_size = sum(self.output_sizes), whole[0].shape[1]


class ColumnParallelLinear(LinearBase):
    """Some rows of each part; keys of few heads stand on several workers."""

    def __init__(self, whole, workers, rank, replicas=1, bias=()):
        super().__init__(whole, workers, rank)
        self.num_kv_head_replicas = replicas
        shares = [(workers, rank)] + [(workers // replicas, rank // replicas)] * (len(whole) - 1)
        own = lambda part, share: part.chunk(share[0])[share[1]]  # noqa: E731
        parts = [own(part, share) for part, share in zip(whole, shares, strict=True)]
        self.output_partition_sizes = [len(part) for part in parts]
        self.weight = nn.Parameter(torch.cat(parts))
        if bias:
            self.bias = nn.Parameter(torch.cat([own(part, share) for part, share in zip(bias, shares, strict=True)]))


class RowParallelLinear(LinearBase):
    """Some columns."""

    def __init__(self, whole, workers, rank):
        super().__init__([whole], workers, rank)
        self.weight = nn.Parameter(whole.chunk(workers, 1)[rank].contiguous())


class VocabParallelEmbedding(nn.Module):
    """Some words, and room for more."""

    def __init__(self, whole, workers, rank):
        super().__init__()
        own = whole.chunk(workers)[rank]
        self.tp_size, self.org_vocab_size, self.embedding_dim = workers, len(whole), whole.shape[1]
        first = rank * len(own)
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=first, org_vocab_end_index=first + len(own), num_org_elements=len(own)
        )
        self.weight = nn.Parameter(torch.cat([own, torch.zeros(3, whole.shape[1])]))
        self.quant_method = Method()


class ParallelLMHead(VocabParallelEmbedding):
    pass


def tensors(kv_heads):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.attn.q_proj.weight": (HEADS * WIDTH, HIDDEN),
        "model.attn.k_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "model.attn.v_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "model.attn.q_proj.bias": (HEADS * WIDTH,),
        "model.attn.k_proj.bias": (kv_heads * WIDTH,),
        "model.attn.v_proj.bias": (kv_heads * WIDTH,),
        "model.attn.o_proj.weight": (HIDDEN, HEADS * WIDTH),
        "model.mlp.gate_proj.weight": (FEED, HIDDEN),
        "model.mlp.up_proj.weight": (FEED, HIDDEN),
        "model.mlp.down_proj.weight": (HIDDEN, FEED),
        "lm_head.weight": (WORDS, HIDDEN),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def worker(named, workers, rank, replicas=1):
    get = lambda place, *leaves: [named[f"model.{place}.{leaf}"] for leaf in leaves]  # noqa: E731
    model, inner = nn.Module(), nn.Module()
    model.packed_modules_mapping, model.model = FUSED, inner
    inner.embed_tokens = VocabParallelEmbedding(named["model.embed_tokens.weight"], workers, rank)
    inner.norm, inner.attn, inner.mlp = nn.Module(), nn.Module(), nn.Module()
    inner.norm.weight = nn.Parameter(named["model.norm.weight"].clone())
    qkv, bias = (
        get("attn", "q_proj.weight", "k_proj.weight", "v_proj.weight"),
        get("attn", "q_proj.bias", "k_proj.bias", "v_proj.bias"),
    )
    inner.attn.qkv_proj = ColumnParallelLinear(qkv, workers, rank, replicas, bias)
    inner.attn.o_proj = RowParallelLinear(named["model.attn.o_proj.weight"], workers, rank)
    inner.mlp.gate_up_proj = ColumnParallelLinear(get("mlp", "gate_proj.weight", "up_proj.weight"), workers, rank)
    inner.mlp.down_proj = RowParallelLinear(named["model.mlp.down_proj.weight"], workers, rank)
    model.lm_head = ParallelLMHead(named["lm_head.weight"], workers, rank)
    return model


@pytest.mark.parametrize("columns", [0, 7])
@pytest.mark.parametrize(("workers", "kv_heads", "replicas"), [(1, 3, 1), (2, 2, 1), (4, 2, 2), (2, 6, 1)])
def test_all_workers_together_hold_every_element(workers, kv_heads, replicas, columns):
    named = tensors(kv_heads)
    seen = {name: torch.zeros_like(chosen_columns(tensor, columns, 5)) for name, tensor in named.items()}
    for rank in range(workers):
        for part in held(worker(named, workers, rank, replicas), columns, 5):
            sample = chosen_columns(named[part.name], columns, 5)
            assert torch.equal(part.of(sample), part.value), part.name
            assert part.is_whole or workers > 1
            marked = seen[part.name][part.rows]
            marked[..., slice(None) if part.picked is None else part.picked] = 1
    assert all(marked.all() for marked in seen.values())


def test_one_element_of_one_workers_share_is_found():
    named = tensors(2)
    for name in named:
        found = []
        for rank in range(2):
            model = worker(named, 2, rank)
            spoiled = {
                **named,
                name: named[name]
                + torch.nn.functional.one_hot(torch.tensor(0), named[name].numel()).view(named[name].shape),
            }
            other = worker(spoiled, 2, rank)
            same = [
                torch.equal(one.value, two.value) for one, two in zip(held(model, 0, 0), held(other, 0, 0), strict=True)
            ]
            found.append(all(same))
        # The first element is on the first worker; a norm is on both.
        assert found == [False, name != "model.norm.weight"], name


def test_a_share_that_has_none_of_the_chosen_columns_says_nothing_of_that_matrix():
    (chosen,) = columns_of(FEED, 1, 3).tolist()
    named, has = tensors(2), chosen // (FEED // 2)
    names = [{part.name for part in held(worker(named, 2, rank), 1, 3)} for rank in range(2)]
    assert "model.mlp.down_proj.weight" in names[has]
    assert "model.mlp.down_proj.weight" not in names[1 - has]
