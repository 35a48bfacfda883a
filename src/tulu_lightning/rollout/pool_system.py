"""What the scoring pool asks of the system: limits of a process, death with its parent, strays found and ended.

Linux has all of it. Where a call is missing, the pool works without that safeguard.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
from socket import socket

__all__ = [
    "adopt_orphans",
    "die_with_parent",
    "end_children",
    "end_group",
    "has_children",
    "limit",
    "limit_memory",
    "read_frame",
    "write_frame",
]

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FILE_BYTES = 64 << 20
HEAD = struct.Struct("!Q")


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, in whatever way; call it right after the fork.

    Args:
        parent: process id of the parent, taken before the fork.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found and ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def limit(kind: int, value: int) -> None:
    """Set a resource limit, soft and hard, as far down as the hard limit that holds already allows."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def limit_memory(megabytes: int) -> None:
    """Limit this process and what it starts: address space, size of a written file, no core files."""
    with contextlib.suppress(ValueError, OSError):  # macOS has the name and not the limit
        limit(resource.RLIMIT_AS, megabytes << 20)
    limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    limit(resource.RLIMIT_CORE, 0)


def end_group(pid: int) -> None:
    """Kill a child and its process group, and wait for the child."""
    for kill in (os.killpg, os.kill):  # the group is not there yet when the child has only just been forked
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def end_children(keep: set[int] | frozenset[int] = frozenset()) -> None:
    """Kill and reap every child of this process but those to keep: what a job left behind."""
    for _ in range(1000):  # a child killed hands its own children up: look again until there is none
        strays = [pid for pid in _children() if pid not in keep]
        if not strays:
            return
        for pid in strays:
            end_group(pid)


def _children() -> list[int]:
    """Process ids of the children, asked of /proc: a child may have started a session of its own."""
    mine, found = os.getpid(), []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                # "pid (command) state parent ...": the command may hold anything, brackets too
                if int(file.read().rpartition(b")")[2].split()[1]) == mine:
                    found.append(int(name))
    return found


def has_children() -> bool:
    """Whether this process has a child, dead or alive; costs one system call."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def write_frame(connection: socket, payload: bytes) -> None:
    """Send a message with its length before it."""
    connection.sendall(HEAD.pack(len(payload)) + payload)


def read_frame(connection: socket) -> bytes | None:
    """The next message, or None when the other side is gone."""
    head = _read(connection, HEAD.size)
    return None if head is None else _read(connection, HEAD.unpack(head)[0])


def _read(connection: socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
