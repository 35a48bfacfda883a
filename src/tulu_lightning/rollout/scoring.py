"""From completions to verdicts: text out of token ids, and the prompt's own verifiers on it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.types import Check, Completion, Prompt, Verdict
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Job", "Scorer", "combined", "judge", "response_text", "score", "score_all"]

log = logging.getLogger(__name__)

WORST_LAST = ("right", "wrong", "unparseable", "timeout", "error")


class Job(NamedTuple):
    """What one verdict needs: plain text, so that it can be sent to another process."""

    verifier: str
    response: str
    target: str


def response_text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The response as a reader sees it: without special tokens, white space untouched."""
    ids = completion.ids_L.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def judge(job: Job, verifiers: Verifiers | None = None) -> Verdict:
    """One verdict. A verifier that raises makes the outcome `error`, score 0: one odd response must not end a run.

    Raises:
        InputError: no verifier has that name.
    """
    verifier = (verifiers or Verifiers())[job.verifier]
    try:
        return verifier(job.response, job.target)
    except Exception:
        log.exception("verifier %r failed on target %.100r, response %.200r", job.verifier, job.target, job.response)
        return Verdict("error", 0.0)


def combined(checks: Sequence[Check], verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict out of those of a prompt's checks: the weighted mean score, and the worst outcome.

    Example: right with weight 1 and wrong with weight 3 is wrong, score 0.25.
    """
    if len(checks) == 1:
        return verdicts[0]
    total = sum(check.weight for check in checks)
    score = sum(check.weight * verdict.score for check, verdict in zip(checks, verdicts, strict=True)) / total
    return Verdict(max((v.outcome for v in verdicts), key=WORST_LAST.index), score)


class Scorer:
    """Scores the responses of a run. Close it at the end.

    Args:
        verifiers: of the run; the package's own if left out.
    """

    def __init__(self, verifiers: Verifiers | None = None) -> None:
        self.verifiers = verifiers or Verifiers()

    def score(
        self,
        pairs: Iterable[tuple[Prompt, Completion]],
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """The verdict on each (prompt, completion), in their order."""
        pairs = list(pairs)
        jobs = [Job(k.verifier, response_text(c, tokenizer), k.target) for p, c in pairs for k in p.checks]
        verdicts = iter(self.verdicts(jobs, progress))
        return [combined(p.checks, [next(verdicts) for _ in p.checks]) for p, _ in pairs]

    def verdicts(self, jobs: Sequence[Job], progress: Callable[[int, int], None] | None = None) -> list[Verdict]:
        """The verdict on each job, in their order."""
        return [judge(job, self.verifiers) for job in jobs]

    def close(self) -> None:
        """End what was started; no other call may follow."""


def score(prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """The verdict of the prompt's verifiers on the completion's text."""
    return score_all([(prompt, completion)], tokenizer)[0]


def score_all(pairs: Iterable[tuple[Prompt, Completion]], tokenizer: PreTrainedTokenizerBase) -> list[Verdict]:
    """The verdict on each (prompt, completion), in their order, by the package's own verifiers."""
    return Scorer().score(pairs, tokenizer)
