"""A mixture that cannot be meant is refused in one line, before any weights load; one that can be is parsed as written."""

import json
from pathlib import Path

import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.models.backbone import PackedLM

CONFIGS = Path(__file__).parents[1] / "configs"


def chat(answer):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*sources)` starts the tiny SFT stage on them in an empty folder: (status, output, complaint)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PackedLM, "__init__", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    Path("rows.jsonl").write_text("".join(json.dumps({**chat(str(i)), "id": i}) + "\n" for i in range(20)))

    def start(*sources, options=()):
        data = {"init_args": {"sources": [{"name": f"s{i}", **source} for i, source in enumerate(sources)]}}
        Path("mine.yaml").write_text(yaml.safe_dump({"include": [str(CONFIGS / "sft_tiny.yaml")], "data": data}))
        try:
            status = cli.main(["fit", "--config", "mine.yaml", *options])
        except SystemExit as leaving:
            status = leaving.code or 0
        out, err = capsys.readouterr()
        return status, out, "".join(line for line in err.splitlines() if line.startswith("tulu: error: "))

    return start


GOOD = {"path": "rows.jsonl"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({**GOOD, "fraction": 1.5}, "source 's1': fraction is 1.5. It is a share of the rows: above 0, to 1."),
        ({**GOOD, "fraction": -0.1}, "source 's1': fraction is -0.1. It is a share"),
        ({**GOOD, "fraction": 0.0}, "source 's1': fraction is 0.0. It is a share"),
        ({**GOOD, "fraction": 0.01}, "source 's1': fraction is 0.01, which of 20 rows is none. Raise it"),
        ({**GOOD, "count": 21}, "source 's1': count is 21, and the source has 20 rows. Use at most 20"),
        ({**GOOD, "count": 5, "cap": 5}, "source 's1': both count and cap are given. Give one of them."),
        ({**GOOD, "upsample": 0.5}, "source 's1': upsample is 0.5. Use 1 to 1,000."),
        (
            {**GOOD, "columns": {"messages": "mesages"}},
            "rows.jsonl: columns says messages: mesages, and no row has such a column (there are messages, id). "
            "Did you mean 'messages'?",
        ),
        ({**GOOD, "match": {"sorce": "x"}}, "rows.jsonl: match names 'sorce', and no row has such a column (there"),
        ({**GOOD, "match": {"id": "99"}}, "rows.jsonl: no row has '99' as its 'id'."),
        (
            {**GOOD, "read": "sharegpt"},
            "rows.jsonl, row 1: the row has no field 'conversations' (it has messages, id).",
        ),
        ({**GOOD, "read": "mesages"}, "source 's1': there is no format 'mesages'. Did you mean 'messages'?"),
        ({**GOOD, "filters": [{"words": []}]}, "filters.words: is []. Give at least one word"),
        ({**GOOD, "filters": [{"function": "json.lods"}]}, "filters.function: json.lods is not a function."),
        ({**GOOD, "hub": "a/b"}, "source 's1': both path and hub are given. Give exactly one of them."),
        ({**GOOD, "fractoin": 0.5}, "mine.yaml, line "),
        ({"path": "."}, ".: the folder has no rows that can be read."),
    ],
)
def test_a_mixture_that_cannot_be_meant(run, source, said):
    status, _, complaint = run(GOOD, source)
    assert status == 2
    assert complaint.removeprefix("tulu: error: ").startswith(said), complaint


def test_a_source_without_a_usable_row(run):
    Path("empty.jsonl").write_text("".join(json.dumps(chat(answer)) + "\n" for answer in ("", " ", "by OpenAI")))
    status, _, complaint = run(GOOD, {"path": "empty.jsonl", "filters": [{"words": ["openai"]}]})
    assert status == 2
    assert "source 's1': every row was left out (2 with an empty message, 1 with the word 'openai')." in complaint


def test_a_hub_set_that_cannot_be_reached(run, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    status, _, complaint = run({"hub": "org/set"})
    assert status == 2
    assert "source 's0': org/set cannot be had from the hub (Couldn't reach the hub). Check hub" in complaint


def test_every_setting_of_a_source_can_be_written_in_yaml(run):
    sources = [
        {"path": "a.jsonl.gz", "read": "alpaca", "fraction": 0.5, "upsample": 2, "columns": {"output": "answer"}},
        {"hub": "org/set", "subset": "en", "split": "test", "revision": "abc", "cap": 10, "match": {"source": ["a", "b"]}},
        {"rows": "my.function", "args": {"n": 1}, "count": 3, "keep_empty": True, "limit": 7, "match": {"x": "y"}},
        {"path": "b", "filters": [{"words": ["OpenAI"], "roles": ["user"]}, {"function": "my.is_english"}]},
    ]  # fmt: skip
    status, out, complaint = run(*sources, options=["--print_config"])
    assert (status, complaint) == (0, "")
    parsed = yaml.safe_load(out)["data"]["init_args"]["sources"]
    for given, found in zip(sources[:3], parsed[:3], strict=True):
        assert {key: found[key] for key in given} == given
    assert parsed[3]["filters"] == [
        {"words": ["OpenAI"], "roles": ["user"]},
        {"function": "my.is_english", "reason": None},
    ]
