"""Many requests to one server: so many at a time, at a steady pace, tried again, and given up when it is down."""

import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question
from tulu_lightning.verifiers.chat_server import Reply, RequestFailed, request_chat, with_tries

__all__ = ["served"]

CUT = ("length", "content_filter", "abort")
"""What servers call an answer that is not whole; any other word (stop, eos_token, end_turn) is its end."""
T = TypeVar("T")
R = TypeVar("R")


class _Pace:
    """Lets so many requests begin in a minute, evenly spread."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._next = threading.Lock(), 0.0

    def __call__(self, sleep: Callable[[float], object]) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        if at > now:
            sleep(at - now)


class _Failures:
    """What came to nothing, and when that is enough."""

    def __init__(self, model: Model, known: int) -> None:
        self._model, self._known = model, known
        self._reasons: Counter[str] = Counter()
        self._in_a_row: set[str] = set()
        self._answered = 0
        self._server_alone = True
        self.given_up: str | None = None
        """Why, once it is so."""

    def answered(self) -> None:
        self._in_a_row.clear()
        self._answered += 1

    def add(self, failure: RequestFailed, key: str, number: int) -> None:
        self._reasons[str(failure)[:200]] += 1
        self._server_alone &= failure.lies_in == "server"
        if failure.lies_in == "request" and (self._known or self._answered):
            return  # a server that answers others is not down
        # One prompt that cannot be answered is one failure, however many answers to it are wanted.
        self._in_a_row.add(f"{key}:{number}" if failure.lies_in == "server" else key)
        if len(self._in_a_row) >= self._model.give_up and self.given_up is None:
            self.given_up = f"gave no answer to {len(self._in_a_row)} requests in a row, last: {failure}"

    def tell(self) -> None:
        """Say it, as an error where nothing can be gone on with."""
        told = "; ".join(f"{count} times: {reason}" for reason, count in self._reasons.most_common(3))
        # What was left over by a run that went well must not stop what goes on with it, unless the server is down now.
        hopeless = self._server_alone or self._reasons.total() > self._known
        if self._reasons and not self._answered and hopeless and self.given_up is None:
            self.given_up = f"gave no answer ({told})"
        if self.given_up is not None:
            remedy = "Mend or start the server, and run the same command again; what is done is kept."
            if (self._known or self._answered) and not self._server_alone:
                remedy += " If it is these requests that fail, raise give_up."
            raise InputError(f"model {self._model.name!r} at {self._model.url}", self.given_up, remedy)
        if self._reasons:
            count = self._reasons.total()
            print(f"model {self._model.name!r} gave no answer to {count:,} requests ({told})", file=sys.stderr)


def served(
    model: Model, questions: Iterable[Question], decoding: Decoding, seed: int, known: int = 0
) -> Iterator[tuple[Question, list[Answer]]]:
    """See `making.models.answers`. Each answer comes by itself: what fails takes none of the same question with it."""
    pace, stop, failures = _Pace(model.requests_per_minute), threading.Event(), _Failures(model, known)

    def once(question: Question, number: int) -> Reply:
        pace(stop.wait)
        if stop.is_set():
            raise RequestFailed("the command ends", None)
        drawn = mix_seed(seed, int(question.key[:12], 16), number) & 0x7FFFFFFF
        return request_chat(
            str(model.url), model.served or model.name, question.messages, model.timeout_seconds, model.api_key_env,
            temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=decoding.max_new_tokens, seed=drawn,
        )  # fmt: skip

    def ask(wanted: tuple[Question, int]) -> Answer:
        question, number = wanted
        reply = with_tries(lambda: once(question, number), model.retries, model.backoff_seconds, stop.wait)
        finish = reply.finish if reply.finish in CUT else "stop"
        return Answer(number, reply.text, finish, reply.prompt_tokens, reply.tokens, version=reply.model)

    every = ((question, number) for question in questions for number in question.numbers)
    try:
        for (question, number), outcome in _in_threads(
            ask, every, model.concurrency, lambda: failures.given_up is None
        ):
            if isinstance(outcome, RequestFailed):
                if not stop.is_set():
                    failures.add(outcome, question.key, number)
                if failures.given_up is not None:
                    stop.set()  # what is under way is waited for and kept, and not tried again
                continue
            failures.answered()
            yield question, [outcome]
        failures.tell()
    finally:
        stop.set()


def _in_threads(
    work: Callable[[T], R], items: Iterable[T], most: int, going: Callable[[], bool]
) -> Iterator[tuple[T, R | RequestFailed]]:
    """Each item and its outcome, as they come, with at most `most` under way and none begun once it is not `going`.

    The threads do not keep the process: Ctrl-C leaves requests to themselves in place of minutes of waiting.
    """
    todo: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[T, R | BaseException]] = queue.SimpleQueue()
    threads = running = 0
    try:
        for item in items:
            if threads < most:
                threading.Thread(target=_worker, args=(work, todo, ended), daemon=True).start()
                threads += 1
            todo.put((item,))
            running += 1
            if running == most:
                yield _outcome(*ended.get())
                running -= 1
            if not going():
                break
        while running:
            yield _outcome(*ended.get())
            running -= 1
    finally:
        for _ in range(threads):
            todo.put(None)


def _worker(
    work: Callable[[T], R],
    todo: "queue.SimpleQueue[tuple[T] | None]",
    ended: "queue.SimpleQueue[tuple[T, R | BaseException]]",
) -> None:
    while (item := todo.get()) is not None:
        try:
            ended.put((item[0], work(item[0])))
        except BaseException as error:  # it belongs to whoever waits for the outcome
            ended.put((item[0], error))


def _outcome(item: T, outcome: R | BaseException) -> tuple[T, R | RequestFailed]:
    if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailed):
        raise outcome
    return item, outcome
