"""Log-probs of fixed sequences on both sides: does the sampler compute what the trainer computes?

Checksums say that weights arrived. Canaries say that the engine uses them: with a stale packed head, an old prefix
cache, another rotary scaling or another temperature all checksums are right and the samples are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.rollout.engine import Engine, RefreshError

__all__ = ["Proof", "Sequences", "Tolerance", "canaries", "prove", "tolerance_of"]

Sequences = list[tuple[list[int], list[int]]]
"""(prompt, response) token ids."""
CAUSES = (
    "every checksum is right, so look at what is not a checkpoint tensor: a packed copy of a tied head, cached prefixes "
    "of the old weights, another temperature, dtype or rotary scaling"
)


class Tolerance(NamedTuple):
    """How far the two sides' log-probs may lie apart, in nats a token; null does not look."""

    maximum: float | None
    mean: float | None


class Proof(NamedTuple):
    """How far they lay apart, in nats a token."""

    maximum: float
    mean: float
    tokens: int


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """For engines of that dtype. Measured between vLLM and transformers: 1e-4 at most for float32 on both sides, 0.05
    on average (0.4 at most) where one side or both compute in bfloat16."""
    return Tolerance(1e-3, None) if dtype == torch.float32 else Tolerance(None, 0.1)


def canaries(vocabulary: int, count: int = 2, prompt: int = 144, response: int = 8, seed: int = 0) -> Sequences:
    """Sequences of random tokens: they excite every layer, and nobody has cached them with other weights.

    They share a prefix, longer than a cache block of vLLM (128 tokens on a CPU), so that a prefix cache which
    outlived its weights shows.

    Args:
        vocabulary: size.
        count: sequences.
        prompt: tokens of each prompt, the last 8 its own.
        response: tokens of each response.
        seed: same seed, same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, vocabulary, (prompt - 8,), generator=generator).tolist()
    rest = torch.randint(0, vocabulary, (count, 8 + response), generator=generator).tolist()
    return [([*shared, *row[:8]], row[8:]) for row in rest]


def prove(
    engine: Engine,
    trainer_logprobs: Callable[[Sequences], Sequence[Tensor]],
    sequences: Sequences,
    tolerance: Tolerance,
    temperature: float = 1.0,
    differing: Callable[[], Mapping[str, Sequence[str]]] | None = None,
) -> Proof:
    """Compare both sides' log-probs of the canaries.

    Args:
        engine: after its refresh.
        trainer_logprobs: the trainer's own, float32 `[L]` of each response.
        sequences: see `canaries`.
        tolerance: beyond it the refresh failed.
        temperature: of both sides.
        differing: names of tensors whose checksums differ, by kind of fault; asked only when log-probs differ.

    Returns:
        How far they lie apart, in tokens of the responses.

    Raises:
        RefreshError: further than the tolerance, or not finite. It names the tensors that differ where there are any,
            else it says how large the gap is and what is left to suspect.
    """
    own = torch.cat([part.detach().float().cpu() for part in trainer_logprobs(sequences)])
    theirs = torch.cat([part.float().cpu() for part in engine.logprobs(sequences, temperature)])
    if own.shape != theirs.shape:
        raise ValueError(f"the trainer scored {own.numel()} tokens of the canaries, the engine {theirs.numel()}")
    gap = (own - theirs).abs()
    proof = Proof(float(gap.max()), float(gap.mean()), gap.numel())
    if _within(proof, tolerance):
        return proof
    distrust = getattr(engine, "distrust", None)
    if distrust is not None:  # it held every checksum, so it would go on sampling
        distrust()
    problems = dict(differing() if differing else {})
    limit = f"{tolerance.maximum:g} at most" if tolerance.maximum is not None else f"{tolerance.mean:g} on average"
    size = f"{proof.maximum:.3g} at most and {proof.mean:.3g} on average, allowed {limit}"
    problems["log-probs of the canaries differ"] = [size]
    if not any(names for kind, names in problems.items() if kind != "log-probs of the canaries differ"):
        problems["suspects"] = [CAUSES]
    raise RefreshError(problems)


def _within(proof: Proof, tolerance: Tolerance) -> bool:
    # Written so that a NaN is outside.
    checks = ((proof.maximum, tolerance.maximum), (proof.mean, tolerance.mean))
    return all(gap <= limit for gap, limit in checks if limit is not None) and proof.mean < float("inf")
