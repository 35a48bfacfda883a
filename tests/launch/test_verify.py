"""`tulu verify` from its command line: rows in, the same rows with outcome and score out; and every way to get it wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from tulu_lightning import cli
from tulu_lightning.errors import InputError
from tulu_lightning.launch import verify

ROWS = [
    {"id": 7, "response": "It is 60.", "ground_truth": "60", "extra": {"a": [1, 2.50, None]}, "z": "é \u2028"},
    {"response": "no idea", "ground_truth": "60"},
    {"response": "61", "ground_truth": 60},
    {"ground_truth": "-1,000", "response": "so it is -1000.00"},
]
OUTCOMES = [("right", 1.0), ("unparseable", 0.0), ("wrong", 0.0), ("right", 1.0)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run(source, output, *more, verifier: str = "last_number") -> int:
    return verify.main(["--verifier", verifier, "--input", str(source), "--output", str(output), *map(str, more)])


def test_rows_come_back_in_order_with_outcome_and_score_and_nothing_else_changed(tmp_path, capsys):
    assert run(write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl") == 0
    found = read(tmp_path / "out.jsonl")
    for row, before, (outcome, score) in zip(found, ROWS, OUTCOMES, strict=True):
        assert row == {**before, "outcome": outcome, "score": score}
        assert list(row)[: len(before)] == list(before)
    shown = capsys.readouterr()
    assert shown.out.startswith("4 rows scored by 'last_number' in 0s (")
    lines = [line.split() for line in shown.out.splitlines()[1:]]
    assert lines == [
        ["right", "2", "50.0%"],
        ["wrong", "1", "25.0%"],
        ["unparseable", "1", "25.0%"],
        ["timeout", "0", "0.0%"],
        ["error", "0", "0.0%"],
        ["mean", "score", "0.5000"],
    ]
    assert "verify  4/4  right 50.0%" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_packed_files_and_the_first_rows(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(text))
    run(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.zst", "--limit", 2)
    run(tmp_path / "in.jsonl.zst", tmp_path / "out.jsonl.gz", "--limit", 3)
    with zstandard.open(tmp_path / "out.jsonl.zst", "rt", encoding="utf-8") as file:
        assert [json.loads(line)["outcome"] for line in file] == ["right", "unparseable"]
    with gzip.open(tmp_path / "out.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line)["outcome"] for line in file] == ["right", "unparseable", "wrong"]


def test_an_object_is_the_ground_truth_as_the_verifier_reads_it_and_pooled_rows_keep_their_order(tmp_path):
    tests = {"tests": ["assert f() == 1"]}
    answers = ["def f(): return 1", "def f(): return 2", "def f(", "def f():\n    while True:\n        pass"]
    rows = [{"response": answers[n % 4], "ground_truth": tests, "n": n} for n in range(8)]
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--workers", 2, "--seconds", 20, verifier="code")
    found = read(tmp_path / "out.jsonl")
    assert [row["n"] for row in found] == list(range(8))
    assert [row["outcome"] for row in found] == ["right", "wrong", "unparseable", "timeout"] * 2
    assert found[0]["ground_truth"] == tests


def test_half_of_a_surrogate_pair_goes_through(tmp_path):
    rows = [{"response": "60 \ud800", "ground_truth": "60"}]
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [{**rows[0], "outcome": "right", "score": 1.0}]


def test_what_is_there_is_replaced_only_if_asked(tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(source, output)
    with pytest.raises(InputError, match=r"out.jsonl: is there already. Give another output, or --overwrite"):
        run(source, output)
    with pytest.raises(InputError, match=r"out.jsonl, row 1: has 'outcome' already. Rename that field, or"):
        run(output, tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()
    run(output, tmp_path / "again.jsonl", "--overwrite")
    assert read(tmp_path / "again.jsonl") == read(output)
    with pytest.raises(InputError, match="is the input too"):
        run(source, source, "--overwrite")


GOOD = ROWS[0]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([GOOD, {"ground_truth": "1"}], r"in.jsonl, row 2: has no 'response' \(it has 'ground_truth'\)"),
        ([GOOD, GOOD, {"response": "1"}], r"in.jsonl, row 3: has no 'ground_truth'"),
        ([GOOD, {"response": ["1"], "ground_truth": "1"}], "row 2: its response is a list, not a text"),
        ([{"response": "1", "ground_truth": None}], "row 1: its ground_truth is null"),
        ([{"response": "1", "ground_truth": True}], "row 1: its ground_truth is true"),
        (
            [GOOD, {"response": "1", "ground_truth": "sixty"}],
            "row 2: verifier 'last_number' cannot use its ground_truth",
        ),
        ([GOOD, [1]], "row 2: it is a list, not an object"),
        ([GOOD, "{"], "row 2: it is a str, not an object"),
        ([], "in.jsonl: has no rows"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_scored(tmp_path, lines, text):
    with pytest.raises(InputError, match=text):
        run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_line_that_is_not_json_is_named(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(GOOD) + "\n{'response': 1}\n")
    with pytest.raises(InputError, match=r"in\.jsonl, row 2: the line is not JSON"):
        run(source, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--verifier", "last_numer"], "there is no verifier 'last_numer'. Did you mean 'last_number'"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--output", "nowhere/out.jsonl"], "nowhere: there is no such folder"),
        (["--limit", "0"], "--limit: is 0"),
        (["--workers", "0"], "--workers: is 0"),
        (["--seconds", "-1"], "--seconds: is -1"),
        (["--memory-mb", "8"], "--memory-mb: is 8"),
        (["--memory", "8"], "unrecognized arguments: --memory 8"),
        (["--limit", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_bad_option_is_named(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ROWS)
    given = {"--verifier": "last_number", "--input": "in.jsonl", "--output": "out.jsonl"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(InputError, match=text):
        verify.main([part for pair in given.items() for part in pair])
    assert not Path("out.jsonl").exists()


def test_without_options_it_says_how_and_missing_ones_are_named(capsys):
    assert verify.main([]) == verify.main(["--help"]) == verify.main(["audit", "-h"]) == 0
    assert capsys.readouterr().out.count("usage: tulu verify") == 3
    with pytest.raises(InputError, match="the following arguments are required: --input, --output"):
        verify.main(["--verifier", "exact"])


@pytest.mark.parametrize("raised", [KeyboardInterrupt, InputError("judge", "is down", "Start it.")])
def test_an_end_before_the_end_leaves_no_file(tmp_path, monkeypatch, raised):
    def each(self, jobs):
        yield from enumerate([verify.Verdict("right", 1.0)] * 2)
        raise raised

    monkeypatch.setattr(verify.Scorer, "each", each)
    with pytest.raises(type(raised) if isinstance(raised, Exception) else raised):
        run(write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


OWN = """\
mine:
  class_path: tulu_lightning.verifiers.code.Code
  init_args: {partial: true, seconds: 20}
"""


def test_verifiers_of_your_own_come_from_a_file(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    rows = [{"response": "def f(): return 1", "ground_truth": {"tests": ["assert f() == 1", "assert f() == 2"]}}]
    more = ("--verifiers", tmp_path / "own.yaml", "--seconds", 20)
    run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *more, verifier="mine")
    assert read(tmp_path / "out.jsonl")[0]["score"] == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no verifiers"),
        ("- a", "names no verifiers"),
        ("a: [", "is no YAML"),
        ("a: b", "own.yaml, a: is 'b'. Give each name a class_path"),
        ("a: {class_path: x.Y}", "own.yaml, a.class_path: cannot be imported"),
        ("a: {class_path: tulu_lightning.types.Nothing}", "own.yaml, a.class_path: cannot be imported"),
        (
            "a: {class_path: tulu_lightning.types.Verdict, init_args: {outcome: right, score: 1}}",
            "Verdict is no verifier",
        ),
        (OWN.replace("partial", "portion"), "mine.init_args: do not fit .*portion"),
        (
            "a: {class_path: tulu_lightning.verifiers.judge.Judge, init_args: {url: x, model: m, rubric: r}}",
            "a: judge.url",
        ),
    ],
)
def test_a_bad_file_of_verifiers_is_told(tmp_path, text, told):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        run(write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", "--verifiers", tmp_path / "own.yaml")


def test_the_command_starts_without_torch(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    code = (
        "import sys\nfrom tulu_lightning.cli import main\nstatus = main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules])\nsys.exit(status)"
    )
    options = ["verify", "--verifier", "exact", "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_the_command_line_knows_it(capsys):
    assert cli.main(["verify", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: tulu verify")
