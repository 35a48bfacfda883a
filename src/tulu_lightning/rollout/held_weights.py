"""Inside vLLM: what its layers compute with, read back through their own kernels. Imports nothing of vLLM.

Two habits of vLLM make this necessary. On a CPU it packs each matrix for its kernels and drops the original, so there is
no tensor left to compare with; and it fuses matrices (q, k and v; gate and up). But a matrix gives itself away: its
product with the j-th unit vector is its j-th column, exactly, in any kernel and any order of summation.

Under tensor parallelism a worker has some rows of a matrix (heads, gates, words) or some of its columns (what goes back to the
residual stream), and answers for these.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.step_plan import mix_seed

__all__ = ["Held", "chosen_columns", "columns_of", "held", "shard_of"]

CHUNK = 256  # unit vectors multiplied at once
WHOLE = slice(None)


class Held(NamedTuple):
    """What a worker's layers hold of one tensor of the Hugging Face state dict."""

    name: str
    value: Tensor
    """Of a matrix the chosen columns, as far as the worker has them; else all elements, as far as it has them."""
    rows: slice = WHOLE
    """Of the whole tensor, which `value` is of."""
    picked: Tensor | None = None
    """Places among the chosen columns of those in `value`; None for all."""

    @property
    def is_whole(self) -> bool:
        """Whether no other worker has a part of it."""
        return self.rows == WHOLE and self.picked is None

    def of(self, sample: Tensor) -> Tensor:
        """The same part of the chosen columns of a whole tensor."""
        part = sample[self.rows]
        return part if self.picked is None else part[:, self.picked.to(part.device)]


def columns_of(width: int, columns: int, seed: int) -> Tensor:
    """Which columns of a matrix are compared: `columns` of them, or all for 0 or where there are no more; sorted."""
    if not 0 < columns < width:
        return torch.arange(width)
    generator = torch.Generator().manual_seed(mix_seed(seed, width))
    return torch.randperm(width, generator=generator)[:columns].sort().values


def chosen_columns(tensor: Tensor, columns: int, seed: int) -> Tensor:
    """A copy of the columns of a matrix that are compared; of anything else, of all."""
    if tensor.ndim != 2:
        return tensor.detach().clone()
    return tensor[:, columns_of(tensor.shape[1], columns, seed).to(tensor.device)].clone()


@torch.no_grad()
def held(model: Any, columns: int, seed: int) -> Iterator[Held]:
    """All that the layers hold, with the names of the Hugging Face state dict.

    Fused matrices are cut into their parts by the model's own `packed_modules_mapping`.

    Args:
        model: vLLM's.
        columns: of each matrix; 0 for all.
        seed: chooses them.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "VocabParallelEmbedding" in kinds:
            yield _words(f"{path}.weight", module, "ParallelLMHead" in kinds, columns, seed)
        elif "LinearBase" in kinds:
            owner, _, leaf = path.rpartition(".")
            base = f"{owner}." if owner else ""
            yield from _linear(module, kinds, base, fused.get(leaf, [leaf]), columns, seed)
        else:
            for name, tensor in module.named_parameters(path, recurse=False):
                yield Held(name, tensor.detach())


def _words(name: str, module: Any, is_head: bool, columns: int, seed: int) -> Held:
    """An embedding or a head; a worker has some of the words."""
    rows, count = WHOLE, module.org_vocab_size
    if getattr(module, "tp_size", 1) > 1:
        own = module.shard_indices
        rows, count = slice(own.org_vocab_start_index, own.org_vocab_end_index), own.num_org_elements
    if is_head:
        picked = columns_of(module.embedding_dim, columns, seed)
        return Held(name, _by_unit_vectors(module, module.embedding_dim, picked)[:count], rows)
    return Held(name, chosen_columns(module.weight.detach()[:count], columns, seed), rows)


def _linear(module: Any, kinds: set[str], base: str, parts: list[str], columns: int, seed: int) -> Iterator[Held]:
    """The matrices of a layer and their biases; none where they are fused in a way that the mapping does not tell."""
    width, wanted = module.input_size, columns_of(module.input_size, columns, seed)
    workers, rank = getattr(module, "tp_size", 1), getattr(module, "tp_rank", 0)
    picked, by_rows = None, workers > 1 and "ColumnParallelLinear" in kinds
    if workers > 1 and "RowParallelLinear" in kinds:
        width //= workers
        picked = ((wanted >= rank * width) & (wanted < (rank + 1) * width)).nonzero()[:, 0]
        wanted = wanted[picked] - rank * width
        if not len(wanted):  # other workers have all of them
            return
    whole = list(module.output_sizes) if len(parts) > 1 else [module.output_size]
    sizes = list(module.output_partition_sizes) if by_rows else whole
    matrix, bias = _by_unit_vectors(module, width, wanted), getattr(module, "bias", None)
    if sum(sizes) != len(matrix) or len(sizes) != len(parts):
        return
    starts = [shard_of(module, part) * size for part, size in enumerate(sizes)]
    rows = [slice(at, at + size) if by_rows else WHOLE for at, size in zip(starts, sizes, strict=True)]
    for part, value, own in zip(parts, matrix.split(sizes), rows, strict=True):
        yield Held(f"{base}{part}.weight", value, own, picked)
    for part, value, own in zip(parts, [] if bias is None else bias.split(sizes), rows, strict=bias is not None):
        yield Held(f"{base}{part}.bias", value, own)


def shard_of(module: Any, part: int) -> int:
    """Which share of a fused matrix's part this worker has: where there are more workers than keys' heads, some have the same."""
    if getattr(module, "tp_size", 1) == 1:
        return 0
    return module.tp_rank // (getattr(module, "num_kv_head_replicas", 1) if part else 1)


def _by_unit_vectors(module: Any, width: int, columns: Tensor) -> Tensor:
    """Columns of the matrix that a layer multiplies by, `[outputs, columns]`, read through its own kernel."""
    like = next((tensor for tensor in (*module.parameters(), *module.buffers())), torch.empty(0))
    found = []
    for chosen in columns.split(CHUNK):
        units = torch.zeros(len(chosen), width, dtype=like.dtype, device=like.device)
        units[torch.arange(len(chosen)), chosen.to(like.device)] = 1
        found.append(module.quant_method.apply(module, units, bias=None).T)
    return torch.cat(found, 1)
