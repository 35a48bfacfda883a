"""Starts a command again and again in forks of a process that has imported everything, and kills each with SIGKILL.

A start costs a second then, not ten. Reads one JSON line from standard input, writes one to standard output: see `main`.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

GENERATING = "generating"
"""A file in the run folder while an engine samples."""


def mark_generation(folder: Path) -> None:
    """Let every call of the in-process engine leave a file while it lasts."""
    from tulu_lightning.rollout.local import LocalEngine

    inner = LocalEngine.generate

    def generate(self, *args, **kwargs):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GENERATING).touch()
        try:
            return inner(self, *args, **kwargs)
        finally:
            (folder / GENERATING).unlink(missing_ok=True)

    LocalEngine.generate = generate


def child(argv: list[str], folder: Path, log: Path) -> None:
    """The command, in a session of its own."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tulu_lightning import cli

    mark_generation(folder)
    code = 1
    try:
        code = cli.main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def running(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) == (0, 0)


def where(folder: Path, born: float) -> str:
    """What a command that was started at `born` was doing when it was killed, by what lies in its folder."""
    if any(written > born for written in _times(folder)):  # not what the kill before has left
        return "save"
    if (folder / GENERATING).exists():
        return "generation"
    records = [path for path in _below(folder, "metrics.jsonl") if path.stat().st_size]
    return "step" if records else "start"


def attempt(argv: list[str], folder: Path, log: Path, aim: str, delay: float) -> tuple[str | None, int | None]:
    """One start: (where it was killed, None), or (None, its status) if it ended by itself."""
    (folder / GENERATING).unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        child(argv, folder, log)
    started, born = time.monotonic(), time.time()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None, os.waitstatus_to_exitcode(status)
        fresh = any(written > born for written in _times(folder))
        due = {"save": fresh, "generation": (folder / GENERATING).exists(), "any": True}[aim]
        if due and time.monotonic() - started >= delay:
            place = where(folder, born)
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return place, None
        time.sleep(0.001)


def _times(folder: Path) -> list[float]:
    """When the files of saves in progress were last written."""
    found = []
    for path in _below(folder, "checkpoints/.step-*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_mtime)
    return found


def _below(folder: Path, pattern: str) -> list[Path]:
    """In a run folder, or those of a recipe's stages. Not by `**`: that fails where a folder is renamed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]
    return []


def main() -> int:
    """Asked {argv, folder, log, kills, seed, aims, longest}; answers {kills: [where, ...], status}."""
    asked = json.loads(sys.stdin.readline())
    import tulu_lightning.launch.fit
    import tulu_lightning.recipes.recipe  # noqa: F401

    folder, log = Path(asked["folder"]), Path(asked["log"])
    draw = random.Random(asked["seed"])
    kills: list[str] = []
    status = None
    while status is None:
        if len(kills) < asked["kills"]:
            aim = asked["aims"][len(kills) % len(asked["aims"])]
            delay = draw.uniform(0, asked["longest"]) if aim == "any" else draw.uniform(0, asked["longest"] / 3)
        else:
            aim, delay = "any", 1e9
        place, status = attempt(asked["argv"], folder, log, aim, delay)
        if place is not None:
            kills.append(place)
    print(json.dumps({"kills": kills, "status": status}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
