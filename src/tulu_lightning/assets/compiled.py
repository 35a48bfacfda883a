"""C++ of this package, compiled on the machine that runs it, for that machine's instructions, once.

The source has no dependencies, so compiling takes about a second; the result lies in the cache, under a name made of
the source, the compiler, the processor and the user. Where there is no compiler, or it fails, callers go on without; so they do
with `TULU_COMPILE=0`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tulu_lightning.assets.cache import build_once
from tulu_lightning.errors import InputError

__all__ = ["KERNELS", "Compiled", "compiler", "load_compiled"]

KERNELS = Path(__file__).parent / "kernels"
"""The sources."""

# -ffast-math would also set the whole process to flush denormal numbers to zero (GCC's start-up code for it does).
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
SECONDS = 120

_log = logging.getLogger(__name__)


def compiler() -> str | None:
    """Path of the C++ compiler that `$CXX` names, or of the first that is found; None without one."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ["g++", "clang++", "c++"]) if (found := shutil.which(name))), None
    )


class Compiled(NamedTuple):
    """What came of it."""

    library: ctypes.CDLL | None
    """None where it cannot be made here."""
    said: str
    """The compiler, or why there is no library."""


@functools.cache
def load_compiled(source: Path, defined: tuple[tuple[str, int], ...] = ()) -> Compiled:
    """The library made of one C++ file and the headers beside it; the log says why there is none.

    Import torch first: the library then takes its threads from the OpenMP that torch has loaded.

    Args:
        source: the file.
        defined: macros and their values.
    """
    made = _load(source, dict(defined))
    if made.library is None:
        _log.info("%s is not compiled: %s", source.name, made.said)
    return made


def _load(source: Path, defined: Mapping[str, int]) -> Compiled:
    if os.environ.get("TULU_COMPILE") == "0":
        return Compiled(None, "TULU_COMPILE is 0")
    path = compiler()
    if path is None:
        return Compiled(None, "no C++ compiler is installed ($CXX, g++ or clang++)")
    try:
        try:
            return _opened(path, source, defined)
        except OSError:  # lost or cut short in the cache, by a power failure, say; or nothing may run from there
            shutil.rmtree(_built(path, source, defined), ignore_errors=True)
            return _opened(path, source, defined)
    except subprocess.CalledProcessError as error:
        lines = [*(error.stderr or "").strip().splitlines(), f"nothing and ended with {error.returncode}"]
        return Compiled(None, f"{path} says {next((line for line in lines if 'error' in line), lines[0])}")
    except (OSError, InputError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home
        return Compiled(None, str(error))


def _opened(program: str, source: Path, defined: Mapping[str, int]) -> Compiled:
    library = _built(program, source, defined) / "library.so"
    if not _ours(library):
        return Compiled(None, f"{library} can be written by others, and what it holds would run as you")
    return Compiled(ctypes.CDLL(str(library)), program)


def _built(program: str, source: Path, defined: Mapping[str, int]) -> Path:
    macros = [f"-D{name}={value}" for name, value in sorted(defined.items())]
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    told = [*texts, *FLAGS, *macros, _version(program), _processor(), str(os.getuid())]  # a cache may be shared
    key = hashlib.sha256("\0".join(told).encode()).hexdigest()[:20]

    def build(folder: Path) -> None:
        command = [program, *FLAGS, *macros, "-o", str(folder / "library.so"), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        (folder / "library.so").chmod(0o755)  # whatever the umask: see `_ours`

    return build_once(f"{source.stem}-{key}", build)


def _ours(library: Path) -> bool:
    """Whether nobody but this user or root can have written it, or can put another one there."""
    facts = [path.stat() for path in (library, library.parent)]
    return all(each.st_uid in (os.getuid(), 0) and not each.st_mode & 0o022 for each in facts)


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, timeout=SECONDS)
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return "\n".join(
            line for line in lines if line.startswith(("flags", "Features", "model", "cpu family", "CPU "))
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
