import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tulu_lightning.assets.cache import build_once, cache_dir
from tulu_lightning.errors import InputError

BUILDER = """
import sys, time
from tulu_lightning.assets.cache import build_once

def build(folder):
    (folder / "part").write_text("half")
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(float(sys.argv[2]))
    (folder / "part").write_text("whole")

print(build_once("thing", build))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(log), str(seconds)], stdout=subprocess.DEVNULL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def whole(folder: Path) -> None:
    (folder / "part").write_text("whole")


def test_the_cache_is_where_the_environment_says_or_in_the_home_folder(cache, monkeypatch):
    assert cache_dir() == cache
    monkeypatch.delenv("TULU_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir() == Path("/home/someone/.cache/tulu_lightning")


def test_a_folder_is_built_once(cache):
    calls = []
    for _ in range(2):
        folder = build_once("thing", lambda target: calls.append(target) or whole(target))
        assert folder == cache / "thing"
        assert (folder / "part").read_text() == "whole"
    assert len(calls) == 1


def test_a_build_that_fails_leaves_nothing_under_the_final_name(cache):
    def fail(target):
        whole(target)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_once("thing", fail)
    assert [path.name for path in cache.iterdir()] == [".thing.lock"]
    assert (build_once("thing", whole) / "part").read_text() == "whole"


def test_a_build_killed_midway_is_done_again_and_its_remains_are_removed(cache, tmp_path):
    log = tmp_path / "log"
    process = start(log, seconds=60)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cache / "thing").exists()
    assert len(list(cache.glob(".thing.*.tmp"))) == 1  # what the killed one left

    assert (build_once("thing", whole) / "part").read_text() == "whole"
    assert list(cache.glob(".thing.*.tmp")) == []


def test_of_two_processes_one_builds_and_the_other_waits(cache, tmp_path):
    log = tmp_path / "log"
    processes = [start(log, seconds=0.5) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert log.read_text() == "built\n"
    assert (cache / "thing" / "part").read_text() == "whole"


def test_a_cache_that_cannot_be_written_is_named_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"file/cache: the cache cannot be written .*TULU_CACHE"):
        build_once("thing", whole)


def test_a_disk_that_is_too_full_is_refused_before_the_work():
    def never(target):
        raise AssertionError("it must not be called")

    with pytest.raises(InputError, match=r"thing needs 1000000000\.0 GB"):
        build_once("thing", never, size=10**18)


def test_an_error_of_the_build_itself_is_not_taken_for_one_of_the_disk():
    def misread(target):
        raise OSError("the weights have no header")

    with pytest.raises(OSError, match="no header") as caught:
        build_once("thing", misread)
    assert not isinstance(caught.value, InputError)


def test_a_wait_that_is_too_long_names_the_process_that_holds_the_lock(cache, tmp_path, monkeypatch):
    """The lock of a process that hangs is never dropped; the one that waits says for whom."""
    builder = start(tmp_path / "log", 600)
    try:
        wait_for(tmp_path / "log")
        monkeypatch.setenv("TULU_CACHE_WAIT", "0.3")
        with pytest.raises(
            InputError, match=rf"\.thing\.lock: process {os.getpid()} waited 0\.3 s for process {builder.pid} on "
        ):
            build_once("thing", whole)
    finally:
        builder.kill()
        builder.wait()
    monkeypatch.setenv("TULU_CACHE_WAIT", "60")
    assert (build_once("thing", whole) / "part").read_text() == "whole"
