"""Log-probs of fixed sequences on both sides: does the sampler compute what the trainer computes?

Checksums say that weights arrived. Canaries say that the engine uses them: with a stale packed head, an old prefix
cache, another rotary scaling or another temperature all checksums are right and the samples are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tulu_lightning.rollout.engine import Engine, RefreshError
from tulu_lightning.types import Completion, Sampling

__all__ = ["Agree", "Proof", "Sequences", "Tolerance", "canaries", "follow", "prove", "tolerance_of"]

Result = TypeVar("Result")

Sequences = list[tuple[list[int], list[int]]]
"""(prompt, response) token ids."""
GIVEN, SAMPLED = "log-probs of given tokens differ", "log-probs of sampled tokens differ"
NEW = 4
"""Tokens sampled after each canary's prompt."""


class Agree(Protocol):
    """Makes a call, and raises on all ranks if it fails on any."""

    def __call__(self, call: Callable[[], Result]) -> Result:
        """What the call gave."""
        ...


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
    """For the coarser dtype of both sides: a thousandth at most for float32, 0.3 on average for bfloat16.

    Measured: 1e-4 at most with float32 on both sides. In bfloat16 0.05 on average for sampled tokens of real prompts, and
    up to 0.12 for these random ones, whose log-probs are near -15. A stale head or prefix cache made gaps of 1.9 to 3.2.
    Of what is smaller than bfloat16's rounding the checksums tell.
    """
    return Tolerance(1e-3, None) if dtype == torch.float32 else Tolerance(None, 0.3)


def canaries(vocabulary: int, count: int = 2, prompt: int = 144, response: int = 8, seed: int = 0) -> Sequences:
    """Sequences of random tokens with a common prefix.

    Their prompts are longer than a cache block of vLLM (128 tokens on a CPU), so a prefix cache that outlived
    its weights shows at the second proof: the first has filled it.

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
    agree: Agree = lambda call: call(),
) -> Proof:
    """Compare both sides' log-probs: of the canaries, and of a few tokens that the engine samples after their prompts.

    Args:
        engine: after its refresh.
        trainer_logprobs: the trainer's own log-probs of given sequences, `[L]` of each response.
        sequences: see `canaries`.
        tolerance: beyond it the refresh failed.
        temperature: of both sides.
        differing: names of tensors whose checksums differ, by kind of fault; asked only when log-probs differ.
        agree: makes a call, and raises on all ranks if it fails on any; the trainer's log-probs between its two calls
            may then gather shards.

    Returns:
        How far they lie apart.

    Raises:
        RefreshError: further than the tolerance, or not finite. It names the tensors that differ where there are any,
            else it says how large the gap is and what is left to suspect.
    """
    # Sampled too: vLLM does not read its prefix cache for scores, but does for samples.
    prompts = [prompt for prompt, _ in sequences]

    def asked() -> tuple[list[list[Completion]], list[Tensor]]:
        return engine.generate(prompts, 1, Sampling(NEW, temperature), 0), engine.logprobs(sequences, temperature)

    groups, given_L = agree(asked)
    sampled = [(prompt, group[0].ids_L.tolist()) for prompt, group in zip(prompts, groups, strict=True)]
    own = [part.detach().float().cpu() for part in trainer_logprobs([*sequences, *sampled])]
    theirs = [*given_L, *(group[0].logprobs_L for group in groups)]
    return agree(lambda: _compared(engine, own, theirs, len(sequences), tolerance, differing))


def follow(trainer_logprobs: Callable[[Sequences], Sequence[Tensor]], sequences: Sequences, agree: Agree) -> None:
    """The part in a proof of a rank whose engine is on another one: the same calls, with any tokens for the sampled."""
    agree(lambda: None)
    trainer_logprobs([*sequences, *((prompt, [0] * NEW) for prompt, _ in sequences)])
    agree(lambda: None)


def _compared(
    engine: Engine,
    own: Sequence[Tensor],
    theirs: Sequence[Tensor],
    count: int,
    tolerance: Tolerance,
    differing: Callable[[], Mapping[str, Sequence[str]]] | None,
) -> Proof:
    if [len(part) for part in own] != [len(part) for part in theirs]:
        raise ValueError(f"of the canaries the trainer scored {sum(map(len, own))} tokens, not {sum(map(len, theirs))}")
    gaps = [(a - b).abs() for a, b in zip(own, theirs, strict=True)]
    given, drawn = _proof(gaps[:count]), _proof(gaps[count:])
    wrong = [(kind, part) for kind, part in ((GIVEN, given), (SAMPLED, drawn)) if not _within(part, tolerance)]
    if not wrong:
        return _proof(gaps)
    distrust = getattr(engine, "distrust", None)
    if distrust is not None:  # its own checksums were right, so it would go on sampling
        distrust()
    problems = {kind: list(names) for kind, names in (differing() if differing else {}).items() if names}
    limit = f"{tolerance.maximum:g} at most" if tolerance.maximum is not None else f"{tolerance.mean:g} on average"
    found = {kind: [f"{p.maximum:.3g} at most and {p.mean:.3g} on average, allowed {limit}"] for kind, p in wrong}
    suspects = {} if problems else {"no tensor's checksum differs, suspect": _suspects([kind for kind, _ in wrong])}
    raise RefreshError({**problems, **found, **suspects})


def _suspects(wrong: Sequence[str]) -> list[str]:
    if list(wrong) == [SAMPLED]:
        return ["prefixes cached with the old weights", "sampling settings that change log-probs"]
    return ["a packed copy of a tied head", "another temperature, dtype or rotary scaling"]


def _proof(gaps: Sequence[Tensor]) -> Proof:
    gap_N = torch.cat(list(gaps))
    return Proof(float(gap_N.max()), float(gap_N.mean()), gap_N.numel())


def _within(proof: Proof, tolerance: Tolerance) -> bool:
    # Written so that a NaN is outside.
    checks = ((proof.maximum, tolerance.maximum), (proof.mean, tolerance.mean))
    return all(gap <= limit for gap, limit in checks if limit is not None) and proof.mean < float("inf")
