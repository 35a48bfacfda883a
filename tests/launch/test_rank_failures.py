"""One of two ranks fails in the middle of a step: the run ends, soon, and what is said first is which rank and why."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from tulu_lightning.models.failures import Failure, await_all, follows, names, too_long
from tulu_lightning.models.standing import gone
from tulu_lightning.models.waiting import Watch

CONFIGS = Path(__file__).parents[2] / "configs"
ENOUGH = 150
"""Seconds after which a run that should have ended is called a hang; a start alone takes some on a busy machine."""


def run(folder, fault, strategy="rank_faults.Impatient"):
    """The shipped tiny SFT on two ranks under torchrun, with something that happens to rank 1 in step 2."""
    own = "tulu_lightning.callbacks."
    callbacks = [own + "records.Records", f"rank_faults.{fault}", own + "checkpoints.Checkpoints"]
    config = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"class_path": strategy, "init_args": {}},
            "callbacks": [{"class_path": name} for name in callbacks],
        },
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "tulu_lightning"]
    python_path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *launch, "fit", "--config", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        timeout=ENOUGH,
        check=False,
    )


def said(done):
    """What the ranks said of the failure, torchrun's own summary left out, from the first line that is ours."""
    lines = done.stderr.splitlines()
    return [line for line in lines if line.startswith("tulu: ")], lines


@pytest.mark.slow
def test_a_rank_that_raises_says_so_first_and_once(tmp_path):
    done = run(tmp_path, "Raises")
    ours, lines = said(done)
    assert done.returncode != 0
    assert ours[0] == "tulu: rank 1 of 2 failed: ValueError: this rank has had enough"
    assert set(ours[1:]) <= {"tulu: rank 0 of 2 ends: rank 1 failed: ValueError: this rank has had enough"}
    assert lines.index(ours[0]) < next(i for i, line in enumerate(lines) if "Traceback" in line)
    ranks = {match[1] for line in lines if (match := re.match(r"\[rank(\d)\]: Traceback", line))}
    assert ranks == {"1"}, "the other one has nothing to say of its own"


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path):
    done = run(tmp_path, "Killed")
    ours, lines = said(done)
    assert done.returncode != 0
    assert len(ours) <= 1
    for line in ours:  # torchrun may end the other rank before it has said a word
        assert re.match(r"tulu: rank 0 of 2 ends: rank 1 \(process \d+ on .+\) is gone: killed", line)
    assert not any(re.match(r"\[rank\d\]: Traceback", line) for line in lines)
    cause = "\n".join(lines).split("Root Cause")[1]
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", cause)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_timeout_and_both_places_are_told(tmp_path):
    done = run(tmp_path, "Hangs")
    ours, lines = said(done)
    assert done.returncode != 0
    told = r"rank 0 waited 8 s for rank 1\. rank 0: .*called from stages/\w+\.py:\d+ .*; rank 1: launch/rank_faults\.py:\d+ \(strike\)"
    assert re.match(rf"tulu: rank 1 of 2 ends: {told}$", ours[0])
    assert "time.sleep(3600)" in "\n".join(lines), "the stack of the one that hangs"
    cause = "\n".join(lines).split("Root Cause")[1]
    assert re.search(r"rank +: 1 ", cause)


@pytest.mark.slow
def test_a_rank_that_takes_its_time_to_leave_is_still_the_first(tmp_path):
    done = run(tmp_path, "RaisesAndLingers")
    ours, lines = said(done)
    assert done.returncode != 0
    assert ours[0] == "tulu: rank 1 of 2 failed: ValueError: this rank has had enough"
    assert not any(line.startswith("[rank0]: Traceback") for line in lines)


@pytest.mark.slow
def test_the_same_error_on_all_ranks_is_one_traceback(tmp_path):
    done = run(tmp_path, "AllRaise")
    ours, lines = said(done)
    assert done.returncode != 0
    assert len([line for line in lines if re.match(r"\[rank\d\]: Traceback", line)]) == 1
    assert sum("failed: ValueError" in line for line in ours) >= 1


# The parts, in one process ------------------------------------------------------------------------------------------


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def test_ranks_that_did_not_start_are_named(store):
    store.set("came/2", "")
    with pytest.raises(RuntimeError, match=r"rank 0 waited 0 s for ranks 1 and 3 to start"):
        await_all(store, 0, 4, 0.2, print)


def test_ranks_that_come_late_are_waited_for(store):
    def late():
        time.sleep(0.3)
        store.clone().set("came/1", "")

    thread = threading.Thread(target=late)
    thread.start()
    await_all(store, 0, 2, 20, print)
    thread.join()


def test_the_first_failure_is_the_runs(store):
    first, second = (Watch(store, rank, 2, 30.0) for rank in (0, 1))
    assert first.raised(ValueError("no such row\nmore")) is None
    cause = second.raised(RuntimeError("Connection closed by peer"))
    assert cause == Failure((0,), "rank 0 failed: ValueError: no such row")
    assert follows(RuntimeError("[gloo] Connection closed by peer"), cause)
    assert follows(ValueError("no such row"), cause)
    assert not follows(ValueError("another thing"), cause)


def test_a_rank_that_loses_the_store_with_its_connection_follows_and_another_error_is_its_own():
    """Rank 0 holds the store where no torchrun does: what it failed of it has said itself, and nobody can look it up."""

    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("Connection reset by peer")

        set = get = compare_set = check

    class Closing:
        def clone(self):
            return dist.HashStore()

    watch = Watch(Closing(), 1, 2, 30.0)
    watch._store = Gone()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:9894")
    cause = watch.raised(lost)
    assert cause is not None
    assert "store is gone (rank 0, or its torchrun)" in cause.text
    assert follows(lost, cause)
    assert watch.raised(ValueError("no such row")) is None


def test_a_process_that_left_without_a_word_is_found_and_one_that_was_done_is_not(store):
    child = subprocess.Popen(["true"])  # ended and not waited for: a zombie, as a killed rank under torchrun
    while not gone(child.pid):
        time.sleep(0.01)
    watch = Watch(store, 0, 2, 30.0)
    watch.start()
    who = dist.PrefixStore("watch/0", store)
    mine = who.get("who/0").decode().split("\n")
    who.set("beat/1", "done")
    who.set("who/1", "\n".join([*mine[:2], str(child.pid)]))
    assert watch.raised(ValueError("mine")) is None, "the other one has finished: the failure is this rank's own"
    watch.done()
    child.wait()
    another = Watch(store, 0, 2, 30.0, round=1)
    other = subprocess.Popen(["true"])
    while not gone(other.pid):
        time.sleep(0.01)
    who = dist.PrefixStore("watch/1", store)
    another.start()
    who.set("who/1", "\n".join([*mine[:2], str(other.pid)]))
    assert another.raised(RuntimeError("Connection closed by peer")).ranks == (1,)
    another.done()
    other.wait()


def test_a_long_wait_names_who_is_missing_who_waits_and_who_does_not_answer():
    places = {0: ["1", "in all_reduce"], 1: ["0", "in read_rows"], 3: ["1", "in all_reduce"]}
    failure = too_long(places, 4, 600)
    assert failure.ranks == (1, 2)
    assert failure.text.startswith("ranks 0 and 3 waited 600 s for ranks 1 and 2. ranks 0 and 3: in all_reduce; ")
    assert "rank 1: in read_rows; rank 2: gives no answer" in failure.text
    apart = too_long({0: ["1", "in barrier"], 1: ["1", "in broadcast"]}, 2, 600)
    assert "for each other in different places. rank 0: in barrier; rank 1: in broadcast" in apart.text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0 and 2"),
        (range(8), "ranks 0, 1, 2, 3, 4, 5, 6 and 7"),
        (range(256), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 248 more"),
    ],
)
def test_ranks_by_name(ranks, text):
    assert names(list(ranks)) == text
