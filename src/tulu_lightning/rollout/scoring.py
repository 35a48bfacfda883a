"""From completions to verdicts: text out of token ids, and the prompt's own verifier on it."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.types import Completion, Prompt, Verdict
from tulu_lightning.verifiers import registry

__all__ = ["Job", "judge", "response_text", "score", "score_all"]

log = logging.getLogger(__name__)


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


def judge(job: Job) -> Verdict:
    """One verdict. A verifier that raises makes the outcome `error`, score 0: one odd response must not end a run.

    Raises:
        InputError: no verifier has that name.
    """
    verifier = registry.get(job.verifier)
    try:
        return verifier(job.response, job.target)
    except Exception:
        log.exception("verifier %r failed on target %.100r, response %.200r", job.verifier, job.target, job.response)
        return Verdict("error", 0.0)


def score(prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """The verdict of the prompt's verifier on the completion's text."""
    return score_all([(prompt, completion)], tokenizer)[0]


def score_all(pairs: Iterable[tuple[Prompt, Completion]], tokenizer: PreTrainedTokenizerBase) -> list[Verdict]:
    """The verdict on each (prompt, completion), in their order."""
    return _judge_all([Job(p.verifier, response_text(c, tokenizer), p.target) for p, c in pairs])


def _judge_all(jobs: Sequence[Job]) -> list[Verdict]:
    # The one place where verdicts are made, so that a pool of processes can take it over.
    return [judge(job) for job in jobs]
