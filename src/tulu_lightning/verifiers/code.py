"""Python code, judged by running it against tests."""

import ast
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tulu_lightning.types import Outcome, Verdict
from tulu_lightning.verifiers.code_runner import LIMIT, NO_CODE, PASSED, digest

__all__ = ["Code", "program_of"]

RUNNER = Path(__file__).with_name("code_runner.py")
START_SECONDS = 30.0
"""For the interpreter to start, on top of the time of the tests."""
FORMS = (
    'a JSON object with "tests" (a list of statements), with "prompt", "test" and "entry_point" (HumanEval), or with '
    '"inputs" and "outputs" (two lists of texts)'
)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.#-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py", "py3")


def program_of(response: str) -> str:
    """The code of a response: its last fenced block of Python (or of no language), else the whole text.

    A block that is not closed (a response cut short) goes on to the end. Blocks of other languages are passed over
    unless there are no others.
    """
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(response):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            blocks.append((opened[2].lower(), response[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), response[opened.end() + 1 :]))
    python = [text for language, text in blocks if language in _PYTHON]
    return (python or [text for _, text in blocks] or [response])[-1]


@dataclass(frozen=True)
class Code:
    """Right when the code of the response passes every test of the target.

    The target is JSON: `{"tests": ["assert f(1) == 2", ...]}` (or that list alone), HumanEval's
    `{"prompt": ..., "test": ..., "entry_point": ...}`, where the response may be the whole function or its body, or
    `{"inputs": [...], "outputs": [...]}`, where the code is a program that reads standard input and whose standard
    output counts, but for white space at the ends of lines.

    Outcomes: `unparseable` when there is no code or it is no Python; `timeout` when a test goes over its time or memory;
    `wrong` when one fails.

    Each response runs in a fresh `python -I`, with an empty environment, no standard input, in an empty folder that is
    removed, within limits of time, processor time, memory, file size, processes, and with each test in a process of its
    own. On Linux it has no network and sees no other processes (namespaces; where a kernel or a container refuses them,
    Landlock refuses TCP and a hook in the interpreter refuses sockets and programs: that stops code that tries, not code
    that attacks the interpreter). With Landlock (kernel 5.13) it writes nothing outside its folder; reading is not
    restricted. Started as root it runs as a user of its own. A test passed is told by a number drawn for the purpose, so
    printing or exiting passes none; code that searches the interpreter's memory for the number could forge it, and code
    that hands tests an object equal to everything passes them. Elsewhere than on Linux only the resource limits hold.

    Args:
        partial: score is the share of tests passed, instead of 1 for all and 0 for fewer.
        seconds: wall-clock time of all tests of a response; the scoring pool's limit holds too.
        memory_mb: address space of a process.
        file_mb: size of a file.
        processes: processes and threads at a time.
    """

    runs: ClassVar = "pool"
    partial: bool = False
    seconds: float = 3.0
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 16

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0, or the share of tests.

        Raises:
            ValueError: the target cannot be used; `complaint` says so beforehand.
        """
        found = _parsed(target)
        if isinstance(found, str):
            raise ValueError(found)
        code = program_of(response)
        if not code.strip():
            return Verdict("unparseable", 0.0)
        code, tests = _task(code, found)
        states = self._run(code, tests)
        score = states.count(PASSED) / len(tests)
        return Verdict(_outcome(states, len(tests)), score if self.partial else float(score == 1))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        found = _parsed(target)
        return found if isinstance(found, str) else None

    def _run(self, code: str, tests: list[Any]) -> list[str]:
        """The states of the tests, in order; fewer than there are when the others do not matter or nothing came back."""
        order = {
            "code": code,
            "tests": tests,
            "all": self.partial,
            "seconds": self.seconds,
            "memory_mb": self.memory_mb,
            "file_mb": self.file_mb,
            "processes": self.processes,
        }
        with tempfile.TemporaryDirectory(prefix="tulu-code-", ignore_cleanup_errors=True) as folder:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", str(RUNNER)],
                    input=json.dumps(order).encode(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={},
                    timeout=self.seconds + START_SECONDS,
                    check=False,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired:
                return [LIMIT]
        return json.loads(done.stdout or b"[]")


def _outcome(states: list[str], tests: int) -> Outcome:
    if NO_CODE in states:
        return "unparseable"
    if LIMIT in states or not states:  # nothing came back: the runner itself was ended by a limit
        return "timeout"
    return "right" if states.count(PASSED) == tests else "wrong"


def _parsed(target: str) -> dict[str, Any] | str:
    """The target's object, or what is wrong with it."""
    try:
        found = json.loads(target)
    except ValueError:
        return f"{target[:80]!r} is not JSON; give {FORMS}"
    found = {"tests": found} if isinstance(found, list) else found
    if not isinstance(found, dict):
        return f"it is a {type(found).__name__}; give {FORMS}"
    if "tests" in found:
        return _bad_tests(found["tests"]) or found
    if {"prompt", "test", "entry_point"} <= found.keys():
        wrong = [name for name in ("prompt", "test", "entry_point") if not isinstance(found[name], str)]
        return f"{wrong[0]!r} is not a text" if wrong else _bad_tests([found["test"]]) or found
    if {"inputs", "outputs"} <= found.keys():
        return _bad_pairs(found["inputs"], found["outputs"]) or found
    return f"it has {', '.join(map(repr, found)) or 'nothing'}; give {FORMS}"


def _bad_tests(tests: Any) -> str | None:
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        return '"tests" is not a list of one or more texts'
    for number, test in enumerate(tests, start=1):
        try:
            ast.parse(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"test {number} is no Python ({error})"
    return None


def _bad_pairs(inputs: Any, outputs: Any) -> str | None:
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return f'"{name}" is not a list of one or more texts'
    return None if len(inputs) == len(outputs) else f"it has {len(inputs)} inputs and {len(outputs)} outputs"


def _task(code: str, target: dict[str, Any]) -> tuple[str, list[Any]]:
    """The program to run, and its tests: statements, or pairs of an input and the digest of the output."""
    if "tests" in target:
        return code, target["tests"]
    if "inputs" in target:
        wanted = [digest(text.encode("utf-8", "surrogateescape")) for text in target["outputs"]]
        return code, [list(pair) for pair in zip(target["inputs"], wanted, strict=True)]
    name = target["entry_point"]
    head = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    if head.search(code):  # the whole function: what the prompt has before it (imports, helpers) still counts
        start = head.search(target["prompt"])
        program = target["prompt"][: start.start() if start else 0] + "\n" + code
    else:
        program = target["prompt"] + code
    return program, [f"{target['test']}\ncheck({name})\n"]
