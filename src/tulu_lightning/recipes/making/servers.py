"""Many requests to one server: so many at a time, at a steady pace, tried again, and given up when it is down."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question
from tulu_lightning.verifiers.chat_server import Reply, RequestFailed, request_chat, with_tries

__all__ = ["served"]


class _Pace:
    """Lets so many requests begin in a minute, evenly spread."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._next = threading.Lock(), 0.0

    def __call__(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        if at > now:
            time.sleep(at - now)


def served(
    model: Model, questions: Sequence[Question], decoding: Decoding, seed: int
) -> Iterator[tuple[Question, list[Answer]]]:
    """See `making.models.answers`."""
    pace = _Pace(model.requests_per_minute)

    def once(question: Question, number: int) -> Reply:
        pace()
        drawn = mix_seed(seed, int(question.key[:12], 16), number) & 0x7FFFFFFF
        return request_chat(
            str(model.url), model.served or model.name, question.messages, model.timeout_seconds, model.api_key_env,
            temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=decoding.max_new_tokens, seed=drawn,
        )  # fmt: skip

    def all_of(question: Question) -> list[Answer]:
        made = []
        for number in range(question.n):
            reply = with_tries(lambda number=number: once(question, number), model.retries, model.backoff_seconds)
            finish = "length" if reply.finish == "length" else "stop"
            made.append(Answer(reply.text, finish, reply.prompt_tokens, reply.tokens, None, None))
        return made

    failed_in_a_row, answered, reasons = 0, 0, Counter[str]()
    for question, future in _in_threads(all_of, questions, model.concurrency):
        try:
            made = future.result()
        except RequestFailed as failure:
            failed_in_a_row += 1
            reasons[str(failure)[:200]] += 1
            if failed_in_a_row >= model.give_up:
                what = f"gave no answer to {failed_in_a_row} prompts in a row, last: {failure}"
                remedy = "Mend or start the server, and run the same command again; what is done is kept."
                raise InputError(f"model {model.name!r} at {model.url}", what, remedy) from None
            continue
        failed_in_a_row = 0
        answered += 1
        yield question, made
    if reasons:
        told = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common(3))
        if not answered:
            remedy = "Mend or start the server, and run the same command again; what is done is kept."
            raise InputError(f"model {model.name!r} at {model.url}", f"gave no answer ({told})", remedy)
        print(f"model {model.name!r} gave no answer to {reasons.total():,} prompts ({told})", file=sys.stderr)


def _in_threads(
    work: Callable[[Question], list[Answer]], questions: Iterable[Question], most: int
) -> Iterator[tuple[Question, "Future[list[Answer]]"]]:
    """Each question and its outcome, as they come, with at most `most` under way; a stop waits for those alone."""
    left = iter(questions)
    with ThreadPoolExecutor(most) as pool:
        running: dict[Future[list[Answer]], Question] = {}
        try:
            for question in left:
                running[pool.submit(work, question)] = question
                if len(running) >= most:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        finally:
            for future in running:
                future.cancel()


def _finished(
    running: "dict[Future[list[Answer]], Question]",
) -> Iterator[tuple[Question, "Future[list[Answer]]"]]:
    ended, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in ended:
        yield running.pop(future), future
