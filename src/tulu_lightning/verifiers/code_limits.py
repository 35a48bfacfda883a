"""What shuts a program in, on Linux: resource limits, namespaces, a user of its own, Landlock.

Run by `verifiers/code_runner.py` in the program's own process; imports the standard library only.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from typing import Any

UIDS = 1_900_000_000
"""Programs run by root get a user id of their own from here on, so that limits and permissions apply to them."""
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
CAP_DAC_READ_SEARCH = 2
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_LANDLOCK = 444  # and the two after it; the same on every machine

libc = ctypes.CDLL(None, use_errno=True)


def shut_in(order: dict[str, Any]) -> set[str]:
    """Limit and isolate this process and those that it will start.

    Args:
        order: with the limits; gets `nproc`, the limit of processes that is left to set for a program.

    Returns:
        Which of "network", "processes" and "user" are the program's own from here on.
    """
    limit(order)
    order["nproc"] = order["processes"]
    if sys.platform != "linux":
        return set()
    left = isolate()
    if not drop_root() and "user" not in left:
        order["nproc"] = 0  # counted with all else that this user runs: a program gets no process of its own
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    lock_files()
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the programs must not read this process's memory or files
    die_with_parent()  # forgotten when the user changed
    return left


def unshare(spaces: int) -> bool:
    """Whether this process could leave the namespaces."""
    return libc.unshare(spaces) == 0


def limit(order: dict[str, Any]) -> None:
    """Limits of this process and those that it starts."""
    megabyte = 1 << 20
    seconds = int(order["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, order["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, order["file_mb"] * megabyte),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(kind)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has the name of one of them and not the limit
            resource.setrlimit(kind, (least, least))


def isolate() -> set[str]:
    """Leave what can be left of the machine's "network", "processes" and "user" namespaces; which were left."""
    root = os.geteuid() == 0
    for own_user in (0, CLONE_NEWUSER) if root else (CLONE_NEWUSER,):
        user = {"user"} if own_user else set()
        if unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID | own_user):
            return {"network", "processes"} | user
        if unshare(CLONE_NEWNET | own_user):
            return {"network"} | user
    return set()


def drop_root() -> bool:
    """From root to a user of its own that may still read what root may (the interpreter may lie in root's home)."""
    if os.geteuid() != 0:
        return False
    uid = UIDS + os.getpid()
    os.chown(".", uid, uid)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:  # a container that knows few users
        return False
    number = SYS_CAPSET.get(os.uname().machine)
    if number is not None:
        reading = 1 << CAP_DAC_READ_SEARCH
        head = struct.pack("Ii", 0x20080522, 0)
        libc.syscall(number, head, struct.pack("6I", reading, reading, 0, 0, 0, 0))
    return True


def lock_files() -> None:
    """Nothing may be written, made or removed but below the working folder, by Landlock, where the kernel has it.

    Newer kernels also refuse TCP (version 4) and signals to processes outside (version 6).
    """
    version = libc.syscall(SYS_LANDLOCK, None, 0, 1)
    if version < 1:
        return
    files = sum(1 << bit for bit in (1, *range(4, 13)))  # write a file, remove, make
    files |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)  # refer, truncate
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(SYS_LANDLOCK, rules, size, 0)
    if ruleset < 0:
        return
    for path, rights in ((".", files), ("/dev/null", 1 << 1)):
        folder = os.open(path, os.O_PATH)
        libc.syscall(SYS_LANDLOCK + 1, ruleset, 1, struct.pack("=Qi", rights, folder), 0)
        os.close(folder)
    libc.syscall(SYS_LANDLOCK + 2, ruleset, 0)
    os.close(ruleset)


def refuse_network() -> None:
    """Where the kernel gives no network of its own: Python's own sockets and processes are refused."""

    def hook(event: str, _: object) -> None:
        if event.startswith(("socket.", "ctypes.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")):
            raise PermissionError(errno.EPERM, f"{event} is not allowed here")

    sys.addaudithook(hook)


def die_with_parent() -> None:
    """Have this process killed when its parent ends, on Linux."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
