"""The folder where things that are built once are kept, and how they get there whole or not at all."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tulu_lightning.errors import InputError

__all__ = ["build_once", "cache_dir", "locked", "writing"]

LONGEST_WAIT = 4 * 3600.0
"""Seconds that a process waits for another one that builds the same thing, unless `$TULU_CACHE_WAIT` says otherwise."""


def cache_dir() -> Path:
    """`$TULU_CACHE`, or `~/.cache/tulu_lightning`; not created here."""
    return Path(os.environ.get("TULU_CACHE") or "~/.cache/tulu_lightning").expanduser()


def build_once(name: str, build: Callable[[Path], None], size: int = 0) -> Path:
    """The cached folder `name`, built by the first call that finds it missing.

    `build` writes into a temporary folder beside the final one, which is renamed when it is complete. So a folder
    under its final name is always whole: a killed build leaves only a temporary folder, which the next build removes.
    Other processes that want the same folder wait on a lock, which the system drops when its holder dies.

    Args:
        name: folder name inside the cache; put a version into it if the way of building may change.
        build: fills the empty folder that it is given.
        size: bytes that the folder will take; checked before the work starts.

    Returns:
        The finished folder.

    Raises:
        InputError: the cache cannot be written, for want of rights or of space.
    """
    final = cache_dir() / name
    if final.is_dir():
        return final
    with writing():
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.parent / f".{name}.lock"):
            if not final.is_dir():  # it may have appeared while we waited
                if shutil.disk_usage(final.parent).free < size:
                    raise OSError(errno.ENOSPC, f"{name} needs {size / 1e9:.1f} GB")
                _build(final, build)
    return final


@contextmanager
def writing(folder: Path | None = None, variable: str = "TULU_CACHE") -> Iterator[None]:
    """What the disk refuses inside of it becomes an InputError that names the folder (the cache), and how to move it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the disk's: libraries raise bare OSErrors about what they read
            raise
        remedy = f"Make room and rights there, or point {variable} to another folder."
        raise InputError(str(folder or cache_dir()), f"the cache cannot be written ({error})", remedy) from error


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock that the system drops when its holder dies.

    Args:
        path: the lock's file; it stays, and says who holds it.
        waiting: called once if another process holds the lock, before waiting for it.

    Raises:
        InputError: another process has held it for longer than `$TULU_CACHE_WAIT` seconds (4 hours); names it.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            _await(lock, path)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _await(lock: TextIO, path: Path) -> None:
    longest = float(os.environ.get("TULU_CACHE_WAIT") or LONGEST_WAIT)
    start = time.monotonic()
    while True:
        time.sleep(0.1)
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() - start > longest:
            lock.seek(0)
            what = f"process {os.getpid()} waited {longest:g} s for {lock.read() or 'another process'}, which holds it"
            remedy = (
                "See whether that one still works, and end it if not; TULU_CACHE_WAIT sets how many seconds to wait."
            )
            raise InputError(str(path), what, remedy)


def _build(final: Path, build: Callable[[Path], None]) -> None:
    for left_over in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    folder.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a shared cache
    try:
        build(folder)
        with suppress(FileExistsError):  # where locks do not hold (some network disks) another process may be first
            folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
