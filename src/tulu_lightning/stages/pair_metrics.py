"""What one step on preference pairs reports: means over its pairs, of some numbers by source too."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PairMetrics"]

COUNTS = ("pairs", "tokens", "trained_tokens")


class PairMetrics(Metric):
    """Sums over the packs of a step, and over ranks when computed.

    Args:
        names: what is averaged over pairs.
        sources: names of the sources, the same on every rank.
        by_source: those of `names` that are reported for each source as well.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str], sources: Sequence[str] = (), by_source: Sequence[str] = ()) -> None:
        super().__init__()
        self.names, self.sources, self.by_source = tuple(names), tuple(sources), tuple(by_source)
        # One tensor, so that ranks exchange one: the counts, the sums, then for each source its pairs and its sums.
        size = len(COUNTS) + len(self.names) + len(self.sources) * (1 + len(self.by_source))
        self.add_state("sums", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, values: Mapping[str, Tensor], sources_B: Sequence[int] | Tensor, tokens: int, trained: int
    ) -> None:
        """Count the pairs of one pack.

        Args:
            values: one number per pair, by name; every name must be there.
            sources_B: index of each pair's source.
            tokens: of the pack, without padding.
            trained: tokens of it that got a log-prob.
        """
        device = self.sums.device
        number_B = torch.as_tensor(sources_B, dtype=torch.int64, device=device)
        table = torch.stack([values[name].detach().to(device, torch.float64) for name in self.names])
        own = [number_B.new_tensor([number_B.numel(), tokens, trained]).double(), table.sum(1)]
        if self.sources:  # summed by index, not picked by mask: a mask would make a GPU wait for each source
            columns = [torch.ones_like(table[0]), *(table[self.names.index(name)] for name in self.by_source)]
            sums = table.new_zeros(len(self.sources), len(columns))
            own.append(sums.index_add(0, number_B, torch.stack(columns, 1)).flatten())
        self.sums += torch.cat(own)

    def compute(self) -> dict[str, float]:
        """`pairs`, `tokens` and `trained_tokens`, each name's mean, and `name/source`; nothing for a source without pairs."""
        values = self.sums.tolist()
        result = dict(zip(COUNTS, values, strict=False))
        rest = values[len(COUNTS) :]
        result |= {name: total / max(result["pairs"], 1) for name, total in zip(self.names, rest, strict=False)}
        rest = rest[len(self.names) :]
        width = 1 + len(self.by_source)
        for index, source in enumerate(self.sources):
            pairs, *totals = rest[index * width : (index + 1) * width]
            if pairs:
                result |= {
                    f"{name}/{source}": total / pairs for name, total in zip(self.by_source, totals, strict=True)
                }
        return result
