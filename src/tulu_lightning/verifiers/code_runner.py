"""Runs a program against tests, shut in: `python -I code_runner.py` reads a JSON order from standard input.

Started by `verifiers/code.py` as a process of its own, and imports the standard library only. Three processes: this one
sets the limits and leaves the namespaces of the machine, the second one (the first of its namespace) starts a third for
each test. Only the third one runs what a model wrote; it has no way to the verifier, and of an expected output this file
never knows more than a digest.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import runpy
import secrets
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

PASSED, FAILED, NO_CODE, LIMIT = "passed", "failed", "no code", "limit"
EXIT_NO_CODE, EXIT_MEMORY = 11, 12
OUTPUT = 4 << 20
"""Bytes of standard output that are read."""


def main() -> None:
    """Read the order, run it shut in, print the states of the tests as JSON."""
    shut = runpy.run_path(str(Path(__file__).with_name("code_limits.py")))  # no package: `-I` finds none
    shut["die_with_parent"]()
    order = json.loads(sys.stdin.buffer.read())
    left = shut["shut_in"](order)
    order["refuse_network"] = () if "network" in left else (shut["refuse_network"],)
    if "processes" not in left:
        serve(order, left)
        return
    pid = os.fork()
    if pid == 0:
        shut["die_with_parent"]()
        serve(order, left)
        os._exit(0)
    os.waitpid(pid, 0)


def serve(order: dict[str, Any], left: set[str]) -> None:
    """Run each test in a process of its own, for as long as there is time and, unless all count, none failed."""
    states: list[str] = []
    end = time.monotonic() + order["seconds"]
    for test in order["tests"]:
        state = run(order, test, end)
        if "processes" in left:  # what the test started, wherever it hid
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(-1, signal.SIGKILL)
        states.append(state)
        if state == NO_CODE or (state != PASSED and not order["all"]):
            break
    sys.stdout.write(json.dumps(states))
    sys.stdout.flush()


def run(order: dict[str, Any], test: Any, end: float) -> str:
    """One test: the state that it ended in."""
    nonce = secrets.token_bytes(16)
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(source)
            os.setpgid(0, 0)
            for refuse in order["refuse_network"]:
                refuse()
            if isinstance(test, list):
                program(order, test[0], sink)
            else:
                assertions(order, test, sink, nonce)
        finally:
            os._exit(1)
    os.close(sink)
    said = listen(pid, source, end)
    os.close(source)
    if said is None:
        kill(pid)
    status = wait(pid, end)
    if said is None or status in (-signal.SIGXCPU, -signal.SIGKILL, EXIT_MEMORY):
        return LIMIT
    if status == EXIT_NO_CODE:
        return NO_CODE
    if isinstance(test, list):
        return PASSED if status == 0 and digest(said) == test[1] else FAILED
    return PASSED if said == nonce else FAILED


def kill(pid: int) -> None:
    """A test's process and its group."""
    for signal_to in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal_to(pid, signal.SIGKILL)


def listen(pid: int, source: int, end: float) -> bytes | None:
    """What comes through the pipe until its writer ends, cut at a limit; None if the time is over first."""
    parts, files = b"", [source]
    with contextlib.suppress(OSError, AttributeError):  # its children may hold the pipe open when it has ended
        files.append(os.pidfd_open(pid))
    while True:
        left = end - time.monotonic()
        ready = select.select(files, [], [], left)[0] if left > 0 else []
        part = os.read(source, 1 << 16) if source in ready else b""
        parts = (parts + part)[:OUTPUT]
        if not part:
            for file in files[1:]:
                os.close(file)
            return parts if ready else None


def wait(pid: int, end: float) -> int:
    """The exit status, or minus the signal; a process that closed its pipe and lives on is killed at the end."""
    # Left unreaped until its group is dead, or its number could be another's.
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() >= end:
            kill(pid)
        time.sleep(0.001)
    kill(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assertions(order: dict[str, Any], test: str, sink: int, nonce: bytes) -> NoReturn:
    """Define what the program defines, run the test on it, and say so with the nonce."""
    keep_only(sink, None)
    limit_processes(order)
    scope: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compiled(order["code"]), scope)
        exec(compile(test, "test", "exec"), scope)
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except BaseException:
        os._exit(1)
    os.write(sink, nonce)
    os._exit(0)


def program(order: dict[str, Any], given: str, sink: int) -> NoReturn:
    """Run the program as a script, with the input as standard input; its standard output goes through the pipe."""
    with open("input", "wb+", buffering=0) as file:
        file.write(given.encode("utf-8", "surrogatepass"))
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    keep_only(0, sink)
    limit_processes(order)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "surrogateescape")
    status = 0
    try:
        exec(compiled(order["code"]), {"__name__": "__main__"})
    except MemoryError:
        status = EXIT_MEMORY
    except SystemExit as end:
        status = 0 if end.code in (None, 0) else 1
    except BaseException:
        status = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)


def limit_processes(order: dict[str, Any]) -> None:
    """Processes and threads that the program may have beside its own."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (order["nproc"], order["nproc"]))


def compiled(code: str) -> Any:
    """The program; a text that is none ends the process."""
    try:
        return compile(code, "solution", "exec")
    except (SyntaxError, ValueError, RecursionError, OverflowError):
        os._exit(EXIT_NO_CODE)


def keep_only(kept: int, output: int | None) -> None:
    """Close all files but one and the standard three; what is printed goes to the output, or nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    if kept != 0:
        os.dup2(null, 0)
    os.dup2(null if output is None else output, 1)
    os.dup2(null, 2)
    os.closerange(3, kept)
    os.closerange(max(kept, 2) + 1, 64)


def digest(output: bytes) -> str:
    """Of an output, as far as it counts: not the white space at the end of each line, nor empty lines at the end."""
    lines = [line.rstrip() for line in output.rstrip().split(b"\n")]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


if __name__ == "__main__":
    main()
