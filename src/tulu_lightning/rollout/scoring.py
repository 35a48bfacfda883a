"""From completions to verdicts: text out of token ids, and the prompt's own verifiers on it."""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.pool import Answer, Call, Pool, PoolLimits
from tulu_lightning.rollout.stop_texts import text_of
from tulu_lightning.types import Check, Completion, Prompt, Verdict
from tulu_lightning.verifiers.registry import Runs, Verifiers, runs_in

if TYPE_CHECKING:  # `tulu verify` scores text and starts in a tenth of the time without it
    from transformers import PreTrainedTokenizerBase

__all__ = ["Job", "PoolLimits", "Scorer", "combined", "judge", "response_text", "score", "score_all"]

log = logging.getLogger(__name__)

WORST_LAST = ("right", "wrong", "unparseable", "timeout", "error")
CONCURRENCY = 8
"""Threads for a verifier that runs in one and does not say how many it wants (`concurrency`)."""
FAILURES_TOLD = 3
"""Failures of a verifier that are logged in full."""


class Job(NamedTuple):
    """What one verdict needs: plain text, so that it can be sent to another process."""

    verifier: str
    response: str
    target: str


def response_text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The response as a reader sees it: without special tokens, white space untouched."""
    return text_of(completion.ids_L.tolist(), tokenizer)


def judge(job: Job, verifiers: Verifiers | None = None) -> Verdict:
    """One verdict, in this process: nothing stops a verifier that hangs.

    A verifier that raises makes the outcome `error`, score 0: one odd response must not end a run.

    Raises:
        InputError: no verifier has that name, or it says that the run cannot go on.
    """
    verifier = (verifiers or Verifiers())[job.verifier]
    try:
        return verifier(job.response, job.target)
    except InputError:
        raise
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
    worst = max(verdicts, key=lambda verdict: WORST_LAST.index(verdict.outcome))
    return Verdict(worst.outcome, score)


class Scorer:
    """Scores the responses of a run. Close it at the end.

    Each verifier is called where it says (`runs`): here, in a process of the scoring pool, which is started when it is
    first needed, or in a thread.

    Args:
        verifiers: of the run; the package's own if left out.
        limits: of the scoring pool.
    """

    def __init__(self, verifiers: Verifiers | None = None, limits: PoolLimits | None = None) -> None:
        self.verifiers = verifiers or Verifiers()
        self.pool = Pool(limits)
        self.failures: Counter[str] = Counter()
        """By verifier: calls that raised, went over a limit or took their process down."""

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(
        self,
        pairs: Iterable[tuple[Prompt, Completion]],
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """The verdict on each (prompt, completion), in their order; `progress` as for `verdicts`."""
        pairs = list(pairs)
        jobs = [Job(k.verifier, response_text(c, tokenizer), k.target) for p, c in pairs for k in p.checks]
        verdicts = iter(self.verdicts(jobs, progress))
        return [combined(p.checks, [next(verdicts) for _ in p.checks]) for p, _ in pairs]

    def verdicts(self, jobs: Sequence[Job], progress: Callable[[int, int], None] | None = None) -> list[Verdict]:
        """The verdict on each job, in their order.

        Args:
            jobs: verifier, response and target.
            progress: called with the number of verdicts so far and of jobs.

        Raises:
            InputError: no verifier has that name, it cannot be sent to another process, or its server is down.
        """
        found: list[Verdict | None] = [None] * len(jobs)
        for done, (place, verdict) in enumerate(self.each(jobs), start=1):
            found[place] = verdict
            if progress is not None:
                progress(done, len(jobs))
        return [verdict for verdict in found if verdict is not None]

    def each(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Verdict]]:
        """Each job's place and verdict, as they come. Raises as `verdicts`."""
        places: dict[Runs, list[int]] = {"here": [], "pool": [], "thread": []}
        where: dict[str, Runs] = {name: runs_in(self.verifiers[name]) for name in {job.verifier for job in jobs}}
        for place, job in enumerate(jobs):
            places[where[job.verifier]].append(place)
        with _Threads() as threads:  # servers are asked while the processors work
            waiting = {
                threads.submit(self._threads_of(jobs[at]), judge, jobs[at], self.verifiers): at
                for at in places["thread"]
            }
            for place in places["here"]:
                yield place, judge(jobs[place], self.verifiers)
            calls = ((at, self._call(jobs[at])) for at in places["pool"])
            for place, answer in self.pool.run(calls) if places["pool"] else ():
                self._tell(jobs[place], answer)
                yield place, answer.verdict
            for future in as_completed(waiting):
                yield waiting[future], future.result()

    def warm(self, jobs: Iterable[Job]) -> None:
        """Start the pool for the verifiers of these jobs, so that the first step does not wait. Raises as `verdicts`."""
        first = {job.verifier: job for job in reversed(list(jobs))}
        for job in first.values():
            if runs_in(self.verifiers[job.verifier]) == "pool":
                self.pool.warm(job.verifier, self.verifiers[job.verifier], job.target)

    def close(self) -> None:
        """End what was started."""
        self.pool.close()

    def _call(self, job: Job) -> Call:
        return Call(job.verifier, self.verifiers[job.verifier], job.response, job.target)

    def _threads_of(self, job: Job) -> tuple[str, int]:
        return job.verifier, getattr(self.verifiers[job.verifier], "concurrency", CONCURRENCY)

    def _tell(self, job: Job, answer: Answer) -> None:
        """Log what went wrong with a call: the first of a verifier in full, then now and then how many there were."""
        if not answer.trouble:
            return
        self.failures[job.verifier] += 1
        count = self.failures[job.verifier]
        if count <= FAILURES_TOLD:
            text = "verifier %r failed on target %.100r, response %.200r: %s"
            log.warning(text, job.verifier, job.target, job.response, answer.trouble)
        elif count & (count - 1) == 0:  # 4, 8, 16 ...
            log.warning("verifier %r failed %d times so far, last: %s", job.verifier, count, answer.trouble)


class _Threads:
    """Thread pools, one for each verifier, that drop what is waiting when left early."""

    def __init__(self) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def __enter__(self) -> _Threads:
        return self

    def submit(self, of: tuple[str, int], call: Callable[..., Verdict], *arguments: object) -> Future[Verdict]:
        name, threads = of
        if name not in self._pools:
            self._pools[name] = ThreadPoolExecutor(threads, thread_name_prefix=f"verifier-{name}")
        return self._pools[name].submit(call, *arguments)

    def __exit__(self, *exception: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


_shared: list[Scorer] = []


def score(prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """The verdict of the prompt's verifiers on the completion's text."""
    return score_all([(prompt, completion)], tokenizer)[0]


def score_all(pairs: Iterable[tuple[Prompt, Completion]], tokenizer: PreTrainedTokenizerBase) -> list[Verdict]:
    """The verdict on each (prompt, completion), in their order, by the package's own verifiers.

    All callers share one pool, which ends with this process.
    """
    if not _shared:
        _shared.append(Scorer())
        atexit.register(_shared[0].close)
    return _shared[0].score(pairs, tokenizer)
