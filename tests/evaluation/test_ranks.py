"""`tulu eval` by several processes: the same items, each once, whatever the number of processes before and after a kill."""

import json
from pathlib import Path

import pytest

from tulu_lightning import cli
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.ranks import collect, rank_sheet, start
from tulu_lightning.evaluation.suite import find_tasks
from tulu_lightning.launch.evaluate import _without_devices

HEAD = {"task": "t", "version": 1, "settings": "s", "model": "m", "seed": 0}
SUITE = ["mmlu_mc_plain", "drop"]


def item(key, score=1.0):
    return {"key": key, "group": "", "target": "", "score": score, "answers": []}


def write(path, head, *keys, torn=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *map(item, keys))) + torn)


def keys(path):
    head, *items = (json.loads(line) for line in path.read_text().splitlines())
    assert head == HEAD
    return [each["key"] for each in items]


def test_items_of_an_earlier_start_are_collected_once(tmp_path):
    sheet = tmp_path / "t.items.jsonl"
    write(sheet, HEAD, "a", "b")
    write(rank_sheet(sheet, 0), HEAD, "b", "c", torn='{"key": "d", "gro')
    write(rank_sheet(sheet, 1), HEAD, "e")
    write(rank_sheet(sheet, 2), {**HEAD, "model": "another"}, "f")
    assert list(collect(sheet, HEAD).items) == ["a", "b", "c", "e"]
    assert keys(sheet) == ["a", "b", "c", "e"]
    assert [path.name for path in tmp_path.iterdir()] == ["t.items.jsonl"]
    assert list(collect(sheet, HEAD).items) == ["a", "b", "c", "e"], "a kill between the two steps doubles nothing"


def test_answers_that_no_process_had_judged_yet_are_collected_too(tmp_path):
    def said(key, text, asked="q"):
        return json.dumps({"key": key, "asked": asked, "said": [{"text": text, "tokens": 1, "finish": "stop"}]}) + "\n"

    sheet = tmp_path / "t.items.jsonl"
    write(sheet, HEAD, "a")
    write(rank_sheet(sheet, 0), HEAD, torn=said("b", "one"))
    write(rank_sheet(sheet, 1), HEAD, torn=said("c", "old", "p") + said("c", "two"))
    found = collect(sheet, HEAD)
    assert {key: each["said"][0]["text"] for key, each in found.said.items()} == {"b": "one", "c": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["t.items.jsonl"]
    assert collect(sheet, HEAD).said == found.said


def test_the_other_arguments_go_to_every_process():
    assert _without_devices(["--model", "m", "--devices", "2", "--limit", "3"]) == ["--model", "m", "--limit", "3"]
    assert _without_devices(["--devices=4", "--suite", "gsm8k"]) == ["--suite", "gsm8k"]


def test_bad_numbers_of_processes(monkeypatch, capsys):
    assert cli.main(["eval", "--model", "m", "--suite", "mmlu_mc_plain", "--devices", "0"]) == 2
    assert "--devices: is 0" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="is 3, and there are 2 GPUs"):
        start(3, [])


@pytest.mark.slow
def test_two_processes_are_one_also_after_a_stop(tmp_path, smol, monkeypatch):
    try:
        find_tasks(SUITE)[1].examples(1)
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = ["eval", "--model", smol, "--suite", *SUITE, "--limit", "3"]
    assert cli.main([*common, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*common, "--out", str(tmp_path / "two"), "--devices", "2"]) == 0
    (one,), (two,) = (sorted(path for path in (tmp_path / n).iterdir() if path.is_dir()) for n in ("one", "two"))

    def results(folder: Path):
        return {name: json.loads((folder / f"{name}.json").read_text()) for name in SUITE}

    assert results(one) == results(two)
    assert not list(two.glob("*rank*"))
    # As after a kill of two processes: what each had finished, and no result. Then one goes on, asking only the rest.
    for name in SUITE:
        (sheet,) = two.glob(f"{name}.*.items.jsonl")
        head, *items = sheet.read_text().splitlines(keepends=True)
        rank_sheet(sheet, 0).write_text("".join([head, *items[:1]]))
        rank_sheet(sheet, 1).write_text("".join([head, items[2], '{"key"']))
        sheet.write_text(head)
        (two / f"{name}.json").unlink()
    assert cli.main([*common, "--out", str(tmp_path / "two")]) == 0
    assert results(one) == results(two)
    for name in SUITE:
        (sheet,) = two.glob(f"{name}.*.items.jsonl")
        asked = [json.loads(line)["key"] for line in sheet.read_text().splitlines()[1:]]
        assert len(asked) == len(set(asked)) == 3
