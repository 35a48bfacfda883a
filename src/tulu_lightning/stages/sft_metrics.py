"""What one SFT step reports: its loss by source, and how many tokens it saw and trained."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from tulu_lightning.core.reduce import document_of
from tulu_lightning.types import Pack

__all__ = ["SourceLoss"]

OWN = 3
"""Numbers that belong to no source: weighted sum, tokens, trained tokens."""


class SourceLoss(Metric):
    """Sums over the packs of a step, and over ranks when computed.

    Args:
        sources: names of the sources, the same on every rank.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__()
        self.sources = list(sources)
        # One tensor, so that ranks exchange one: the three above, then -log p and weight of each source.
        self.add_state("sums", torch.zeros(OWN + 2 * len(sources), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pack: Pack, logp_N: Tensor, reduced_N: Tensor, sources: Sequence[str]) -> None:
        """Count one pack.

        Args:
            pack: the micro-batch; a filler counts for nothing.
            logp_N: log-prob of each scored token.
            reduced_N: what -log p is multiplied by in the loss, before its division.
            sources: source of each of the pack's rows.
        """
        if not pack.rows:
            return
        numbers = {name: index for index, name in enumerate(self.sources)}
        rows = [numbers[name] for name in sources]
        documents = document_of(pack.spans)
        source_S = torch.tensor([rows[d] if d < len(rows) else 0 for d in documents], device=logp_N.device)
        place_N = OWN + 2 * source_S[pack.segment_N]
        nll_N = (-pack.weight_N * logp_N).double()
        self.sums.index_add_(0, place_N, nll_N)
        self.sums.index_add_(0, place_N + 1, pack.weight_N.double())
        trained = (pack.weight_N > 0).sum()
        self.sums[:OWN] += torch.stack(
            [-(reduced_N * logp_N).double().sum(), trained.new_tensor(pack.tokens_T.numel() - pack.padding), trained]
        )

    def compute(self) -> dict[str, float]:
        """`sum` (not yet divided), `tokens`, `trained_tokens`, and `loss/<source>`: mean -log p of a trained token.

        A source without a trained token in the step is left out.
        """
        total, tokens, trained, *by_source = self.sums.tolist()
        pairs = zip(self.sources, by_source[::2], by_source[1::2], strict=True)
        means = {f"loss/{name}": nll / weight for name, nll, weight in pairs if weight}
        return {"sum": total, "tokens": tokens, "trained_tokens": trained, **means}
