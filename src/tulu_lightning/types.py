"""The tuples that cross folders, and the legend of the axes.

A name's suffix says its axes, outermost first:

    T  tokens of a pack, documents end to end; no padding unless a fixed shape is asked for
    S  segments of a pack
    N  scored tokens of a pack: those that get a log-prob (trained, or sampled)
    L  tokens of one segment or one response
    R  responses (or rows) of a batch
    D  hidden width of the model
    V  vocabulary

They are NamedTuples because Lightning moves and pins those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # a verifier's process starts in a tenth of the time without torch
    from torch import Tensor

Outcome = Literal["right", "wrong", "unparseable", "timeout", "error"]
"""`timeout`: the verifier went over its time or memory; `error`: it failed, or its server did. Both score 0."""
Finish = Literal["stop", "length"]


class Segment(NamedTuple):
    """A run of tokens that continues its parent segment, or starts a document.

    Example: a DPO pair is three segments: the prompt (`parent=-1`), the chosen and the rejected answer (`parent=0`).
    """

    ids_L: Tensor
    """int64, token ids."""
    weights_L: Tensor
    """float32, loss weight of each token; 0 means context only: no log-prob is computed for it."""
    parent: int = -1
    """Index, within the document, of the segment that this one continues; -1 for the first one."""


class Document(NamedTuple):
    """One example of any stage: a tree of segments, parents before children."""

    segments: tuple[Segment, ...]


class Span(NamedTuple):
    """Where a segment lies in its pack: tokens [start, end); `parent` is a segment index in the pack, or -1."""

    start: int
    end: int
    parent: int


class Pack(NamedTuple):
    """Documents end to end on one token axis, with what attention and the losses need to know of them.

    Token i of a segment is predicted from the hidden state of the token before it; the first token of a child from
    the last hidden state of its parent. `source_N` holds those places, so the children of one prompt share it.
    """

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, position of each token in its own document (children of one parent restart at the same place)."""
    spans: tuple[Span, ...]
    """One per segment, in order, on the host: attention is cut by these."""
    source_N: Tensor
    """int64, index into T of the hidden state that predicts each scored token."""
    target_N: Tensor
    """int64, the scored token itself."""
    weight_N: Tensor
    """float32, its loss weight."""
    segment_N: Tensor
    """int64, index into S of the segment it belongs to."""
    rows: tuple[int, ...]
    """Row of the data set behind each document, in order; empty for a filler pack (weights all 0)."""
    padding: int = 0
    """Tokens at the end of the pack that belong to no row: its last segment, which nothing else sees and nobody reads.
    0 unless packs are padded to few shapes."""


class StepBatch(NamedTuple):
    """One rank's share of one global step of SFT, DPO or reward modelling: the micro-batches to accumulate."""

    step: int
    """Global step number, from 0."""
    packs: tuple[Pack, ...]
    """This rank's micro-batches; every rank has the same number of them."""
    denominator: float
    """What the summed loss of the whole step (all ranks) is divided by: loss weight (SFT) or pairs (DPO)."""
    rows: tuple[int, ...]
    """Rows that make up the global step, over all ranks."""


class Check(NamedTuple):
    """One verifier's part in the score of a prompt's responses."""

    verifier: str
    """Its name."""
    target: str
    """Ground truth, as the verifier reads it."""
    weight: float = 1.0
    """What its score is multiplied by."""


class Prompt(NamedTuple):
    """One RL or evaluation prompt, rendered and tokenised."""

    ids: tuple[int, ...]
    checks: tuple[Check, ...]
    """At least one; a response's score is their weighted mean, its reward counts the sum of their weights."""
    text: str
    """The last user message, for people."""
    row: int
    """Row of the data set it came from."""
    source: str = ""
    """Name of the source or data set, by which scores are reported."""

    @property
    def target(self) -> str:
        """Ground truth of the first check, for people."""
        return self.checks[0].target

    @property
    def weight(self) -> float:
        """Sum of the checks' weights."""
        return sum(check.weight for check in self.checks)


class PromptBatch(NamedTuple):
    """The prompts of one global PPO step; every rank gets all of them and takes its share itself."""

    step: int
    prompts: tuple[Prompt, ...]


class Sampling(NamedTuple):
    """How an engine samples. Training keeps to temperature 1 without truncation (no top-p, no top-k)."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    stop_ids: tuple[int, ...] = ()
    """A sampled token in this set ends the response; it is kept as its last token."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability; 1 leaves none out."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 leaves none out."""


class Completion(NamedTuple):
    """What an engine returns for one sample. Token ids are the record; text is derived from them."""

    ids_L: Tensor
    """int64, sampled tokens with the stop token, if one was sampled."""
    logprobs_L: Tensor
    """float32, the sampler's own log-probs of those tokens, at its temperature."""
    finish: Finish
    version: int
    """Version of the weights that made it."""


class Verdict(NamedTuple):
    """What a verifier says of one response."""

    outcome: Outcome
    score: float
    """In [0, 1]."""
