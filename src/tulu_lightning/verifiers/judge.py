"""A learned verifier: a language model behind an OpenAI-compatible server, asked with a rubric for a score."""

import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from tulu_lightning.errors import InputError
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.chat_server import RequestFailed, check_server, request_chat, with_tries

__all__ = ["Judge", "JudgeReading", "read_score"]

log = logging.getLogger(__name__)

_SLOT = re.compile(r"\{(\w+)\}")
# Every repetition that could be tried in several ways has a bound, so reading is linear in the answer.
_NUMBER = r"(?<![\d.])(-?\d{1,30}(?:\.\d{1,30})?)(?!\d)"
_OF = rf"(?:\s{{0,5}}(?:/|out of)\s{{0,5}}{_NUMBER})"
_DRESS = r"[\s\"'*`_:=\[(]{0,20}"
_LABELLED = re.compile(rf"\b(?:score|rating|grade)\b{_DRESS}(?:(?:is|of)\b{_DRESS})?{_NUMBER}{_OF}?", re.IGNORECASE)
_BRACKETS = re.compile(rf"\[\[\s{{0,5}}{_NUMBER}{_OF}?\s{{0,5}}\]\]")
_FRACTION = re.compile(rf"(?<!/){_NUMBER}{_OF}(?!/)")
_BARE = re.compile(rf"{_NUMBER}{_OF}?")


def read_score(text: str, scale_max: float) -> float | None:
    """The score in a judge's answer, as a share of the scale; None where there is none, or one off the scale.

    Reads, in this order, the last of: `[[7]]`; `Score: 7`, `"rating": 7`, also with `/10` or `out of 10`; `7/10`; an
    answer that is a number alone. Whatever a reasoning model wrote up to `</think>` does not count.
    """
    text = text.rpartition("</think>")[2]
    for pattern in (_BRACKETS, _LABELLED, _FRACTION):
        found = list(pattern.finditer(text))
        if found:
            return _share(found[-1], scale_max)
    bare = _BARE.fullmatch(text.strip("*`_. \r\n\t"))
    return _share(bare, scale_max) if bare else None


def _share(match: re.Match[str], scale_max: float) -> float | None:
    given, of = match.groups()
    most = float(of) if of else scale_max
    share = float(given) / most if most > 0 else -1.0
    return share if 0.0 <= share <= 1.0 else None


@dataclass(frozen=True)
class JudgeReading:
    """What a `Judge` makes of an answer of its server: the response is the answer, the target is `scale_max`.

    For the audit, which has no server.
    """

    runs: ClassVar = "here"
    threshold: float = 0.5

    def __call__(self, response: str, target: str) -> Verdict:
        """As `Judge`, without a second try."""
        share = read_score(response, float(target))
        if share is None:
            return Verdict("error", 0.0)
        return Verdict("right" if share >= self.threshold else "wrong", share)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if re.fullmatch(r"\d+(\.\d+)?", target) else f"{target!r} is no scale"


class _Failures:
    """How a judge's calls fared, over all threads; stays behind when the judge is sent to another process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.total = 0
        self.in_a_row = 0

    def __reduce__(self) -> tuple[type["_Failures"], tuple[()]]:
        return _Failures, ()


@dataclass(frozen=True)
class Judge:
    """The score that a model gives a response by a rubric, as a share of the scale.

    Asks `URL/chat/completions` (a local `vllm serve`, or any server of that interface), greedily. A request that fails
    is tried again with growing pauses; a response for which all tries fail has the outcome `error`, with one warning
    for the first and then now and then a count. After `give_up` such responses in a row the run stops.

    Args:
        url: of the server, up to `/v1`; `/v1` is added to an address without a path.
        model: as the server names it.
        rubric: the question, with slots `{response}` and `{target}`. If targets are JSON objects, their texts have slots
            of their names (e.g. `{prompt}`). Ask for a line such as "Score: N".
        scale_max: the best score; 0 is the worst.
        threshold: share of the scale from which a response counts as right.
        timeout_seconds: for one request, answer included.
        retries: further tries after one that failed for a reason that may pass.
        concurrency: requests at a time.
        give_up: responses in a row without a score after which the run stops.
        api_key_env: environment variable that holds the key, if the server wants one.
        max_tokens: of the judge's answer.
        backoff_seconds: first pause; each further one is twice as long.

    Raises:
        InputError: a value is out of range, the rubric has no slot for the response, or the key is not set.
    """

    runs: ClassVar = "thread"
    # Where it is and how it is asked makes no other judge of it (compare=False): a run goes on with it at another port.
    url: str = field(compare=False)
    model: str
    rubric: str
    scale_max: float = 10.0
    threshold: float = 0.5
    timeout_seconds: float = field(default=60.0, compare=False)
    retries: int = field(default=3, compare=False)
    concurrency: int = field(default=16, compare=False)
    give_up: int = field(default=20, compare=False)
    api_key_env: str | None = field(default=None, compare=False)
    max_tokens: int = 512
    backoff_seconds: float = field(default=1.0, compare=False)
    _failures: _Failures = field(default_factory=_Failures, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_server("judge", self.url, self.api_key_env)
        if "{response}" not in self.rubric:
            raise InputError("judge.rubric", "has no {response}", "Write {response} where the response is to stand.")
        if not 0 < self.threshold <= 1:
            raise InputError(
                "judge.threshold", f"is {self.threshold}", "Use a share of the scale, above 0 and up to 1."
            )
        for name, least in (
            ("retries", 0),
            ("concurrency", 1),
            ("give_up", 1),
            ("max_tokens", 1),
            ("backoff_seconds", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"judge.{name}", f"is {getattr(self, name)}", f"Use at least {least}.")
        for name in ("scale_max", "timeout_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"judge.{name}", f"is {getattr(self, name)}", "Use a number above 0.")

    def __call__(self, response: str, target: str) -> Verdict:
        """The judge's score; outcome `right` from the threshold on.

        Raises:
            InputError: the server has failed `give_up` times in a row.
        """
        question = _filled(self.rubric, {**_slots(target), "response": response})
        try:
            share = self._ask(question)
        except RequestFailed as failure:
            self._count(str(failure))
            return Verdict("error", 0.0)
        with self._failures.lock:
            self._failures.in_a_row = 0
        return Verdict("right" if share >= self.threshold else "wrong", share)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None: it lacks what the rubric has a slot for."""
        slots = {"response", *_slots(target)}
        missing = sorted(set(_SLOT.findall(self.rubric)) - slots)
        return (
            f"the rubric wants {{{missing[0]}}}, and the target is no JSON object with {missing[0]!r}"
            if missing
            else None
        )

    def _ask(self, question: str) -> float:
        """The share of the scale, after as many tries as it takes."""

        def once() -> float:
            message = {"role": "user", "content": question}
            settings = {"temperature": 0, "max_tokens": self.max_tokens}
            answer = request_chat(
                self.url, self.model, [message], self.timeout_seconds, self.api_key_env, **settings
            ).text
            share = read_score(answer, self.scale_max)
            if share is None:
                raise RequestFailed(f"its answer has no score from 0 to {self.scale_max:g}: {answer[-200:]!r}", 0.0)
            return share

        return with_tries(once, self.retries, self.backoff_seconds)

    def _count(self, what: str) -> None:
        """Tell of a response without a score; stop the run when there are too many in a row."""
        with self._failures.lock:
            self._failures.total += 1
            self._failures.in_a_row += 1
            total, in_a_row = self._failures.total, self._failures.in_a_row
        if total == 1:
            log.warning("judge %s at %s gave no score: %s", self.model, self.url, what)
        elif total & (total - 1) == 0:  # 2, 4, 8 ...
            log.warning("judge %s at %s gave no score %d times so far, last: %s", self.model, self.url, total, what)
        if in_a_row >= self.give_up:
            found = f"model {self.model!r} gave no score for {in_a_row} responses in a row, last: {what}"
            raise InputError(f"judge {self.url}", found, "Mend or start the server, and run the same command again.")


def _slots(target: str) -> dict[str, str]:
    """What a rubric's slots stand for, but for the response."""
    try:
        found = json.loads(target)
    except ValueError:
        found = None
    texts = (
        {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
        if isinstance(found, dict)
        else {}
    )
    return {"target": target, **texts}


def _filled(rubric: str, slots: Mapping[str, str]) -> str:
    """The rubric with its slots filled in one pass: braces in what is filled in stay as they are."""
    return _SLOT.sub(lambda match: slots.get(match[1], match[0]), rubric)
