"""The scoring pool under attack. Nothing here measures time: what hangs is told by outcomes and counts of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.pool import Pool, PoolLimits
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.registry import Verifiers

sys.path.append(str(Path(__file__).parent))  # processes of the pool import it by name

import pool_verifiers

RIGHT, WRONG, TIMEOUT, ERROR = (
    Verdict("right", 1.0),
    Verdict("wrong", 0.0),
    Verdict("timeout", 0.0),
    Verdict("error", 0.0),
)
OWN = {
    "o": pool_verifiers.Obedient(),
    "hangs": pool_verifiers.HangsOnItsTarget(),
    "importing": pool_verifiers.Importing(),
    "warm": pool_verifiers.Warm(),
}


@pytest.fixture
def scorer():
    """`scorer(seconds=1, workers=2, ...)`; closed at the end, and with it all its processes are gone."""
    made = []

    def make(seconds: float = 60, workers: int = 2, **limits) -> Scorer:
        made.append(Scorer(Verifiers(OWN), PoolLimits(workers, seconds, **limits)))
        return made[-1]

    yield make
    for one in made:
        template = one.pool._processes._template
        one.close()
        assert template is None or gone(template.pid)


def jobs(*responses: str, verifier: str = "o", target: str = "target") -> list[Job]:
    return [Job(verifier, response, target) for response in responses]


def gone(pid: int) -> bool:
    """Whether a process ends within half a minute."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def pid_of(verdict: Verdict) -> int:
    return round(verdict.score * 2**32)


def test_hung_answers_cost_one_worker_one_time_limit_each_and_no_other_answer(scorer):
    s = scorer(seconds=1)
    good = [str(n) for n in range(200)]
    responses = [*good[:50], "hang", "hang", *good[50:100], "hang", *good[100:], "hang"]
    found = s.verdicts([Job("o", r, r) for r in responses])
    assert found == [TIMEOUT if r == "hang" else RIGHT for r in responses]
    assert s.pool.ended == 4


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("die 9", ERROR),
        ("die 11", ERROR),  # as a crash in C code does
        ("bomb", TIMEOUT),
        ("raise", ERROR),
        ("recurse", ERROR),
        ("bad outcome", ERROR),
        ("bad score", ERROR),
        ("bad nan", ERROR),
        ("\ud800", WRONG),
        ("\x00", WRONG),
        ("9" * 1_000_000, WRONG),
    ],
)
def test_an_odd_call_costs_itself_only(scorer, response, expected, caplog):
    found = scorer(memory_mb=256).verdicts(jobs("target", response, "target", "other"))
    assert found == [RIGHT, expected, RIGHT, WRONG]
    assert ("verifier 'o' failed" in caplog.text) == (expected in (ERROR, TIMEOUT))


def test_text_arrives_as_it_was(scorer):
    texts = ["\ud800 \udfff", "é" * 500_000, "\x00\r\n\u2028", "", "{" * 100_000]
    assert scorer().verdicts([Job("o", text, text) for text in texts]) == [RIGHT] * len(texts)


def test_a_stopped_worker_is_killed_like_one_that_hangs(scorer):
    assert scorer(seconds=1).verdicts(jobs("stop", "target")) == [TIMEOUT, RIGHT]


def test_a_worker_killed_from_outside_is_replaced(scorer):
    s = scorer(workers=1)
    first = pid_of(s.verdicts(jobs("pid"))[0])
    assert pid_of(s.verdicts(jobs("pid"))[0]) == first
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert s.verdicts(jobs("target")) == [RIGHT]
    assert pid_of(s.verdicts(jobs("pid"))[0]) != first


def test_a_template_killed_from_outside_is_replaced_and_takes_its_workers_along(scorer):
    s = scorer()
    worker = pid_of(s.verdicts(jobs("pid"))[0])
    os.kill(s.pool._processes._template.pid, signal.SIGKILL)
    assert gone(worker)
    assert s.verdicts(jobs("target", "x", "target")) == [RIGHT, WRONG, RIGHT]


def test_workers_are_recycled(scorer):
    s = scorer(workers=1, recycle=3)
    pids = [pid_of(verdict) for verdict in s.verdicts(jobs(*["pid"] * 7))]
    assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize(("order", "expected"), [("forks", RIGHT), ("forks_and_hangs", TIMEOUT)])
def test_processes_that_a_call_leaves_in_sessions_of_their_own_are_ended(scorer, tmp_path, order, expected):
    marker = tmp_path / "pids"
    s = scorer(seconds=30 if expected == RIGHT else 2)
    assert s.verdicts(jobs(f"{order} {marker}")) == [expected]
    left = [int(pid) for pid in marker.read_text().split()]
    assert len(left) == 3
    assert all(gone(pid) for pid in left)


def test_a_worker_has_no_torch_no_terminal_and_no_keys(scorer, monkeypatch, caplog):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    scorer().verdicts(jobs("facts"))
    null = "'/dev/null'"
    assert f"torch=False files=[{null}, {null}, {null}] keys=[] own session=True" in caplog.text


def test_no_process_outlives_a_killed_parent():
    code = (
        "import sys, json; sys.path.append(sys.argv[1]); import pool_verifiers\n"
        "from tulu_lightning.rollout.pool import *\n"
        "pool = Pool(PoolLimits(2, 600)); call = lambda text: Call('o', pool_verifiers.Obedient(), text, '')\n"
        "pids = [round(a.verdict.score * 2**32) for _, a in pool.run(enumerate([call('pid')] * 20))]\n"
        "print(json.dumps([pool._processes._template.pid, *set(pids)]), flush=True)\n"
        "list(pool.run(enumerate([call('hang')] * 4)))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        pids = json.loads(parent.stdout.readline())
        parent.kill()
        parent.wait()
    assert len(pids) >= 2
    assert all(gone(pid) for pid in pids)


def test_calls_are_taken_only_as_workers_become_free():
    taken = []

    def calls():
        for place in range(50):
            taken.append(place)
            from tulu_lightning.rollout.pool import Call

            yield place, Call("o", OWN["o"], "target", "target")

    pool = Pool(PoolLimits(2))
    try:
        for answered, _ in enumerate(pool.run(calls())):
            assert len(taken) <= answered + 2 + 1
        assert len(taken) == 50
    finally:
        pool.close()


def test_a_caller_that_stops_half_way_leaves_a_pool_that_works(scorer):
    s = scorer(seconds=600)
    half = s.each(jobs("target", *["hang"] * 5))
    assert next(half) == (0, RIGHT)
    half.close()
    assert s.verdicts(jobs("target", "x")) == [RIGHT, WRONG]


def test_what_a_call_imports_is_there_in_every_later_worker(scorer):
    s = scorer(workers=1)
    assert s.verdicts(jobs("a", verifier="importing", target="b")) == [WRONG]
    first = s.pool.ended
    assert s.verdicts(jobs("a", verifier="importing", target="b")) == [RIGHT]
    assert s.pool.ended == first + 1  # the worker that had to import was as good, but others were not
    assert scorer(workers=1).verdicts(jobs("a", verifier="warm", target="b")) == [RIGHT]


def test_a_verifier_that_hangs_on_its_own_target_is_started_all_the_same(scorer, monkeypatch, caplog):
    from tulu_lightning.rollout import pool_processes

    monkeypatch.setattr(pool_processes, "REHEARSAL_SECONDS", 1.0)
    s = scorer(seconds=1, workers=1)
    assert s.verdicts(jobs("other", "target", verifier="hangs")) == [WRONG, TIMEOUT]
    assert "hung or died on the text of its own target" in caplog.text


def test_warming_starts_all_workers(scorer):
    s = scorer(workers=2)
    s.warm([Job("o", "", "t"), Job("exact", "", "t")])
    assert s.pool.processes == 2
    assert s.verdicts(jobs("target")) == [RIGHT]


def test_a_closed_pool_starts_again(scorer):
    s = scorer(workers=1)
    first = pid_of(s.verdicts(jobs("pid"))[0])
    s.close()
    assert gone(first)
    assert pid_of(s.verdicts(jobs("pid"))[0]) != first


class Local:
    """Not at a place that another process can import: its module has another name there."""

    def __call__(self, response, target):
        return RIGHT

    def complaint(self, target):
        return None


@pytest.mark.parametrize("case", ["main", "lambda", "module"])
def test_a_verifier_that_cannot_be_sent_is_refused_with_its_name(case, monkeypatch):
    verifier = Local()
    if case == "main":
        monkeypatch.setattr(Local, "__module__", "__main__")
    elif case == "lambda":
        verifier.call = lambda: None
    else:
        module = type(sys)("only_here")
        module.Local = Local
        monkeypatch.setitem(sys.modules, "only_here", module)
        monkeypatch.setattr(Local, "__module__", "only_here")
    what = {
        "main": "which no other process can import",
        "lambda": "cannot be sent to another process",
        "module": "cannot load it .*No module named 'only_here'",
    }[case]
    s = Scorer(Verifiers({"mine": verifier}), PoolLimits(1))
    with s, pytest.raises(InputError, match=rf"verifier 'mine'.*{what}.*[Dd]efine its class"):
        s.verdicts([Job("mine", "a", "a")])


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"workers": 0}, "scoring.workers: is 0"),
        ({"workers": 1.5}, "scoring.workers: is 1.5"),
        ({"seconds": 0}, "scoring.seconds: is 0"),
        ({"seconds": float("nan")}, "scoring.seconds: is nan"),
        ({"memory_mb": 16}, "scoring.memory_mb: is 16. Use a whole number of at least 256"),
        ({"recycle": 0}, "scoring.recycle: is 0"),
    ],
)
def test_limits_out_of_range_are_refused(limits, text):
    with pytest.raises(InputError, match=text):
        PoolLimits(**limits)


def test_workers_share_the_cores_among_the_processes_of_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert PoolLimits().processes == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores * 4))
    assert PoolLimits().processes == 1
    assert PoolLimits(workers=3).processes == 3
