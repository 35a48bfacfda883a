"""NEFTune: uniform noise on the embeddings of a training row (Jain et al. 2023, section 2)."""

import torch
from torch import Tensor

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.types import Pack

__all__ = ["embedding_noise"]


def embedding_noise(pack: Pack, width: int, alpha: float, seed: int, step: int) -> Tensor:
    """Noise for each token of a pack, drawn row by row from (seed, step, row).

    So it depends neither on packing, ranks and splitting nor on any random state, and a resumed run draws the same.

    Args:
        pack: documents and their rows; a filler's and padding stay without noise.
        width: of the embeddings (D).
        alpha: noise is uniform in ±alpha / √(L · D) for a row of L tokens.
        seed: of the run.
        step: global step.

    Returns:
        noise_TD, float32, on the CPU.
    """
    noise_TD = torch.zeros(pack.tokens_T.numel(), width)
    starts = [span.start for span in pack.spans if span.parent < 0]
    ends = [*starts[1:], len(noise_TD)]
    for row, start, end in zip(pack.rows, starts, ends, strict=False):  # padding is a last segment without a row
        generator = torch.Generator().manual_seed(mix_seed(seed, step, row))
        bound = alpha / ((end - start) * width) ** 0.5
        noise_TD[start:end].uniform_(-bound, bound, generator=generator)
    return noise_TD
