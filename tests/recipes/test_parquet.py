"""Rows as Parquet: the same rows, whatever they hold, and none lost or doubled wherever a command is killed."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source, open_source
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making import parquet as module
from tulu_lightning.recipes.making import store as store_module
from tulu_lightning.recipes.making.generate import GenerateConfig, generate
from tulu_lightning.recipes.making.judge import JudgeConfig, judge
from tulu_lightning.recipes.making.parquet import columns_of, rows_of_parquet, write_parquet
from tulu_lightning.recipes.making.pool import Model
from tulu_lightning.recipes.making.store import RowStore, read_rows
from tulu_lightning.recipes.pairs import PairsConfig, make_pairs

sys.path.append(str(Path(__file__).parents[1] / "verifiers"))
from chat_toy import Server

SUMS = PromptSource("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 10})


def some_value(draw, depth=0):
    """Anything that JSON has, and what Arrow would change or refuse."""
    kinds = [
        lambda: draw.choice(["", "text", "é\n\x00", "\ud800", "2026-01-01", "N/A", "null"]),
        lambda: draw.choice([0, 1, -5, 2**53 + 1, 2**70]),
        lambda: draw.choice([0.0, 1.0, 0.1, 1e300]),
        lambda: draw.random() < 0.5,
        lambda: None,
        lambda: {draw.choice("ab"): some_value(draw, depth + 1) for _ in range(draw.randrange(3))},
        lambda: [some_value(draw, depth + 1) for _ in range(draw.randrange(3))],
        lambda: [draw.choice([1, 2, 3]) for _ in range(draw.randrange(3))],
    ]
    return draw.choice(kinds[: 5 if depth > 2 else None])()


def as_read(rows):
    """A field that is None counts as none."""
    return [json.dumps({k: v for k, v in row.items() if v is not None}, sort_keys=True) for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_come_back_as_they_were_from_files_with_the_same_columns(seed, tmp_path):
    draw = random.Random(seed)
    makers = {  # columns of one type, and columns of any
        "key": lambda: f"k{draw.random()}",
        "ids": lambda: [draw.randrange(9) for _ in range(draw.randrange(3))],
        "messages": lambda: [{"role": "user", "content": draw.choice(["a", "ü"])}],
        "share": draw.random,
        **{name: lambda: some_value(draw) for name in "abc"},
    }
    parts = [
        [{name: make() for name, make in makers.items() if draw.random() < 0.8} for _ in range(draw.randrange(1, 8))]
        for _ in range(3)
    ]
    columns = columns_of(parts)
    for place, rows in enumerate(parts):
        write_parquet(tmp_path / f"{place}.parquet", rows, columns)
        assert as_read(rows_of_parquet(tmp_path / f"{place}.parquet")) == as_read(rows)
    assert all(str(columns[name]) == kind for name, kind in (("key", "string"), ("share", "double")) if name in columns)
    table = open_source(Source("all", path=str(tmp_path / "*.parquet")))
    assert [row.get("messages") for row in table.take(range(len(table)))] == [
        row.get("messages") for rows in parts for row in rows
    ]


def test_what_is_no_whole_file_is_named(tmp_path):
    (tmp_path / "rows-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"rows-00000\.parquet: it is no whole Parquet file"):
        list(read_rows(tmp_path))


class Killed(BaseException):
    pass


def wrong_in(tmp_path):
    return [path.name for path in tmp_path.glob("*") if path.suffix not in (".parquet", ".json", ".lock")]


@pytest.mark.parametrize("after", range(12))
def test_killed_at_any_point_no_row_is_lost_or_doubled(after, tmp_path, monkeypatch):
    """Every write, rename and removal of the conversion may be the last thing that a process does."""
    left = [after]

    def dies(function):
        def counted(*arguments, **settings):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **settings)

        return counted

    rows = [{"key": f"k{number}", "rating": 3 if number % 3 else "N/A"} for number in range(9)]
    with RowStore(tmp_path, "test", {}, shard_rows=3) as store:
        store.add(rows)
        with monkeypatch.context() as patch:
            patch.setattr(module, "put_in_place", dies(module.put_in_place))
            patch.setattr(Path, "unlink", dies(Path.unlink))
            patch.setattr(store_module, "write_parquet", dies(store_module.write_parquet))
            if after < 9:  # a write, a rename and a removal for each of three shards
                with pytest.raises(Killed):
                    store.to_parquet()
            else:
                store.to_parquet()
    assert list(read_rows(tmp_path)) == rows, "a reader comes before the next start"
    with RowStore(tmp_path, "test", {}, shard_rows=3) as store:
        assert store.done == {row["key"] for row in rows}
        store.add([{"key": "more", "rating": 1}])
        assert list(store.rows()) == [*rows, {"key": "more", "rating": 1}]
        store.to_parquet()
        store.add([{"key": "last", "rating": 2, "other": True}])
        store.to_parquet()
    wanted = [*rows, {"key": "more", "rating": 1}, {"key": "last", "rating": 2, "other": True}]
    assert list(read_rows(tmp_path)) == wanted
    files = sorted(path.name for path in tmp_path.glob("rows-*"))
    assert files == [f"rows-0000{number}.parquet" for number in range(5)]
    table = open_source(Source("all", path=str(tmp_path / "rows-*.parquet")))
    assert len(table) == 11, "also those of before have the new column"
    assert not list(tmp_path.glob(".*tmp"))


# The commands ---------------------------------------------------------------------------------------------------------

QUALITY = {"good": 5, "fair": 3, "poor": "N/A"}


def reply(request):
    """Writers say their names; the judge rates by these."""
    texts = [line for line in request["messages"][-1]["content"].splitlines() if line in QUALITY]
    return "\n".join(f"Text {n}: {QUALITY[text]}" for n, text in enumerate(texts, start=1)) or request["model"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The three commands in both forms, with a server."""
    server, folder = Server(), tmp_path_factory.mktemp("made")
    server.replies = reply

    def models(*names):
        return [Model(name, url=server.url, retries=0, give_up=1, concurrency=1) for name in names]

    configs = {}
    for kind in ("jsonl", "parquet"):
        out = folder / kind
        responses, ratings = str(out / "responses"), str(out / "ratings")
        configs[kind] = (
            GenerateConfig(output=responses, sources=[SUMS], models=models(*QUALITY), responses=3, format=kind),
            JudgeConfig(
                input=responses, output=ratings, judges=models("even"), aspects=["honesty"], verify=True, format=kind
            ),
            PairsConfig(output=str(out), input=responses, ratings=ratings, held_out_share=0.4, format=kind),
        )
        for command, config in zip((generate, judge, make_pairs), configs[kind], strict=True):
            command(config)
    yield folder, configs
    server.http.shutdown()
    server.http.server_close()


def test_the_commands_write_the_same_rows_in_either_form(made):
    folder, _ = made
    for name in ("responses", "ratings"):
        lines, parquet = (list(read_rows(folder / kind / name)) for kind in ("jsonl", "parquet"))
        assert as_read(parquet) == as_read(lines)
        assert [path.suffix for path in (folder / "parquet" / name).glob("rows-*")] == [".parquet"]
    for name in ("pairs", "held_out"):
        lines = [json.loads(line) for line in (folder / "jsonl" / f"{name}.jsonl").read_text().splitlines()]
        assert as_read(rows_of_parquet(folder / "parquet" / f"{name}.parquet")) == as_read(lines)
    assert not list((folder / "parquet").glob("*.jsonl"))


def test_the_other_form_goes_on_with_what_is_there(made, tmp_path):
    folder, configs = made
    first, _, pairs = configs["parquet"]
    before = as_read(read_rows(first.output))
    assert generate(replace(first, format="jsonl"))["failed"] == 0
    assert as_read(read_rows(first.output)) == before
    again = replace(pairs, output=str(tmp_path), held_out_share=0.0)
    make_pairs(again)
    make_pairs(replace(again, format="jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "summary.json"]
    assert folder.exists()


def test_data_modules_read_either_form(made, tiny):
    folder, _ = made
    shared = {"tokenizer": tiny, "template": "tulu", "max_tokens": 128, "examples_per_step": 1}

    def read_as(kind, module, path, **settings):
        source = PromptSource if module is PromptData else Source
        return module(
            sources=[source("own", path=str(folder / kind / path.replace("KIND", kind)), **settings)], **shared
        )

    pairs = []
    for kind in ("jsonl", "parquet"):
        data = read_as(kind, PreferenceData, "pairs.KIND")
        data.setup()
        pairs.append([[segment.ids_L.tolist() for segment in document.segments] for document in data.documents])
    assert len(pairs[0]) > 1
    assert pairs[0] == pairs[1]
    shard = "responses/rows-00000.KIND"
    lines, parquet = (read_as(kind, PromptData, shard).prompts for kind in ("jsonl", "parquet"))
    assert len(parquet) == 30
    assert [(one.text, one.checks) for one in parquet] == [(one.text, one.checks) for one in lines]
    asked = {"read": "prompt_completion", "columns": {"prompt": "messages", "completion": "response"}}
    lines, parquet = (read_as(kind, SFTData, shard, **asked) for kind in ("jsonl", "parquet"))
    for data in (lines, parquet):
        data.setup()
    assert [d.segments[0].ids_L.tolist() for d in parquet.documents] == [
        d.segments[0].ids_L.tolist() for d in lines.documents
    ]
