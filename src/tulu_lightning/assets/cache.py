"""The folder where things that are built once are kept, and how they get there whole or not at all."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tulu_lightning.errors import InputError

__all__ = ["build_once", "cache_dir", "locked", "writing"]


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
        path: the lock's file; it stays.
        waiting: called once if another process holds the lock, before waiting for it.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
