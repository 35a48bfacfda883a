"""Every file format gives the rows that were written, exactly, and says what is wrong with a file that it cannot read."""

import gzip
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.data import files
from tulu_lightning.data.sources import Source, load, open_source
from tulu_lightning.data.table import ArrowRows
from tulu_lightning.errors import InputError

CHAT = [
    {"id": i, "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "é" * (i % 5 + 1)}]}
    for i in range(40)
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def jsonl(path, rows):
    path.write_bytes(lines(rows))


def jsonl_gz(path, rows):
    path.write_bytes(gzip.compress(lines(rows)))


def jsonl_zst(path, rows):
    half = len(lines(rows)) // 2  # two frames, as parallel compressors write them
    path.write_bytes(b"".join(zstandard.compress(part) for part in (lines(rows)[:half], lines(rows)[half:])))


def json_list(path, rows):
    path.write_text(json.dumps(rows, indent=1))


def json_gz(path, rows):
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


def parquet(path, rows):
    tables = [pa.Table.from_pylist([row]) for row in rows]  # one alone would take its columns from the first row
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path)


def arrow_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


def arrow_folder(path, rows):
    path.mkdir()
    arrow_stream(path / "data-0.arrow", rows[:15])
    arrow_stream(path / "data-1.arrow", rows[15:])


def parquet_folder(path, rows):
    path.mkdir()
    parquet(path / "train-0.parquet", rows[:15])
    parquet(path / "train-1.parquet", rows[15:])


WRITERS = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "lines.json": jsonl,
    "a.jsonl.gz": jsonl_gz,
    "a.jsonl.zst": jsonl_zst,
    "a.json": json_list,
    "a.json.gz": json_gz,
    "a.parquet": parquet,
    "file.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "saved": saved,
    "arrows": arrow_folder,
    "parquets": parquet_folder,
    "glob[1]*.jsonl": jsonl,
    "glob[1]*.parquet": parquet,
}


@pytest.fixture(autouse=True)
def no_litter(tmp_path, monkeypatch):
    """Neither the home folder nor our own cache gets anything from a small file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written(tmp_path, monkeypatch, capsys, name, size):
    if size == "large":
        monkeypatch.setattr(files, "SMALL", 0)
    WRITERS[name](tmp_path / name, CHAT)
    capsys.readouterr()
    for _ in range(2):  # the second time from the cache
        table = open_source(Source("s", path=str(tmp_path / name)))
        assert table.take(range(len(table))) == CHAT
        assert table.take([39, 0]) == [CHAT[39], CHAT[0]]
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "home").exists()
    assert size == "large" or not cache_dir().exists()


def test_a_pattern_takes_all_its_files_in_order_of_their_names(tmp_path):
    parquet_folder(tmp_path / "set", CHAT)
    parquet(tmp_path / "set" / "test.parquet", CHAT[:1])
    assert load(Source("s", path=str(tmp_path / "set" / "train-*.parquet"))) == CHAT


SHARDS = (
    ["train-00000-of-00002.parquet", "train-00001-of-00002-0a1b2c.parquet", "test-00000-of-00001.parquet"],
    ["chat-train-00000-of-00002.arrow", "chat-train-00001-of-00002.arrow", "chat-test.arrow"],
)


@pytest.mark.parametrize("names", SHARDS)
def test_a_folder_whose_files_are_of_several_splits_gives_one(tmp_path, names):
    """As a clone of a hub set has them, and the folder where `datasets` keeps one."""
    for name, part in zip(names, (CHAT[:15], CHAT[15:], CHAT[:3]), strict=True):
        (parquet if name.endswith("parquet") else arrow_stream)(tmp_path / name, part)
    path = str(tmp_path)
    assert load(Source("s", path=path)) == CHAT
    assert load(Source("s", path=path, split="test")) == CHAT[:3]
    with pytest.raises(InputError, match=r"of the splits test, train, not 'tset'\. Did you mean 'test'"):
        load(Source("s", path=path, split="tset"))
    extra = tmp_path / f"extra{Path(names[0]).suffix}"
    extra.write_bytes((tmp_path / names[0]).read_bytes())
    with pytest.raises(
        InputError, match=r"extra\.\w+ tells no split, beside files of test, train\. Move it, or give a"
    ):
        load(Source("s", path=path))
    extra.unlink()
    for name in names[:2]:
        (tmp_path / name).unlink()
    assert load(Source("s", path=path)) == load(Source("s", path=path, split="test")) == CHAT[:3]
    with pytest.raises(InputError, match="split is 'train', and the folder has none"):
        load(Source("s", path=path, split="train"))


def test_what_datasets_keeps_beside_the_rows_is_no_row(tmp_path):
    arrow_folder(tmp_path / "set", CHAT)
    arrow_stream(tmp_path / "set" / "cache-2d81f60c1c60f125.arrow", CHAT[:3])
    assert load(Source("s", path=str(tmp_path / "set"))) == CHAT
    saved(tmp_path / "saved", CHAT)
    before = open_source(Source("s", path=str(tmp_path / "saved"))).fingerprint
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"more": 1})
    assert open_source(Source("s", path=str(tmp_path / "saved"))).fingerprint == before


def test_a_saved_dict_gives_the_split_that_is_asked_for(tmp_path):
    parts = {"train": datasets.Dataset.from_list(CHAT), "test": datasets.Dataset.from_list(CHAT[:3])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    assert len(load(Source("s", path=path))) == 40
    assert load(Source("s", path=path, split="test")) == CHAT[:3]
    with pytest.raises(InputError, match=r"no split 'tset'. Did you mean 'test'"):
        load(Source("s", path=path, split="tset"))


# What `datasets` would change ---------------------------------------------------------------------------------------

ODD = {
    "dates stay text": [{"a": "2024-01-01"}, {"a": "2024-01-02"}],
    "a text in one row, a list in another": [{"a": "x"}, {"a": ["y", {"z": 1}]}],
    "contents of two types": [
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "y"}]}]},
    ],
    "a number that is sometimes text": [{"a": 1}, {"a": "one"}],
    "a key that only some messages have": [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]},
    ],
    "a large number": [{"a": 2**70}],
    "a lone surrogate": [{"a": "\ud800"}],
    "rows without fields": [{}, {}],
    "line separators in strings": [{"a": "x\u2028y\x85z"}],
    "an object in one row, text in another": [{"a": {"b": 1}}, {"a": "c"}],
    "what looks like an agent's trace": [
        {"id": "1", "source": "x", "model": "m", "system_prompt": "", "messages": [{"role": "user", "content": "x"}]}
    ],
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_json_rows_come_out_as_they_are(tmp_path, rows, name):
    text = json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    assert load(Source("s", path=str(tmp_path / name))) == rows


MIXED = {
    "beside each other": [{"a": 3}, {"a": 2.5}],
    "beside a null": [{"a": 3, "b": 1}, {"b": 1}, {"a": 2.5, "b": 1}],
    "in a list": [{"a": [1, 0.5]}, {"a": []}],
    "in messages": [{"m": [{"role": "user", "weight": 1}]}, {"m": [{"role": "user", "weight": 0.5}]}],
    "of which floats lose digits": [{"a": 2**53 + 1}, {"a": 0.5}],
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED)
def test_an_integer_among_floats_stays_one(tmp_path, rows, name):
    """A reader that writes it into a text would write 3.0 for 3."""
    WRITERS[f"a{name.removeprefix('rows')}"](tmp_path / name, rows)
    assert json.dumps(load(Source("s", path=str(tmp_path / name)))) == json.dumps(rows)


def test_floats_that_are_whole_numbers_go_through_datasets_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tulu_lightning.data.jsonl.CHUNK", 7)  # lines cut anywhere
    rows = [{"a": 3.0, "b": [{"c": 1.0}], "d": 1}, {"b": [], "d": 2}, {"a": 2.5, "b": [{"c": 0.5}], "d": 3}]
    jsonl(tmp_path / "rows.jsonl", rows)
    found, _ = files.open_file(str(tmp_path / "rows.jsonl"), None, str)
    assert isinstance(found, files.ArrowRows)
    assert json.dumps(found.take(range(3))) == json.dumps(rows)


def test_a_type_that_changes_late_in_a_file_is_read_all_the_same(tmp_path):
    rows = [{"a": "x" * 100_000}] * 120 + [{"a": ["y"], "b": 1}]  # 12 MB: `datasets` fixes its types after 10
    jsonl(tmp_path / "rows.jsonl", rows)
    assert load(Source("s", path=str(tmp_path / "rows.jsonl"))) == rows


def test_absent_fields_and_nulls_are_left_out_at_every_depth(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q", "name": None}], "system": None},
        {"text": "t", "history": [["a", None]]},
    ]
    expected = [{"messages": [{"role": "user", "content": "q"}]}, {"text": "t", "history": [["a", None]]}]
    for name in ("a.jsonl", "a.parquet"):
        WRITERS[name](tmp_path / name, rows)
        assert load(Source("s", path=str(tmp_path / name))) == expected


# What is wrong with a file ------------------------------------------------------------------------------------------


def fault(path) -> InputError:
    with pytest.raises(InputError) as caught:
        load(Source("s", path=str(path)))
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(
    ("line", "what"),
    [(b'{"a": ', "the line is not JSON ("), (b"", "the line is empty"), (b"null", "the row is a NoneType")],
)
def test_a_bad_line_is_named_by_its_row_in_packed_files_too(tmp_path, name, line, what):
    pack = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.compress}[name]
    (tmp_path / name).write_bytes(pack(b"\n".join([b'{"a": 1}'] * 16 + [line] + [b'{"a": 1}'] * 3)))
    error = fault(tmp_path / name)
    assert error.where == f"{tmp_path / name}, row 17"
    assert error.what.startswith(what)


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_a_packed_file_that_was_cut_short_or_is_none_is_named(tmp_path, name, pack):
    whole = pack(lines([{"a": str(i)} for i in range(10_000)]))
    for content in (whole[:-20], b"not packed at all", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        assert fault(tmp_path / name).what.startswith("the file cannot be read (")
        assert fault(tmp_path / name).where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense"])
def test_a_damaged_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    error = fault(tmp_path / name)
    assert error.where == str(tmp_path / name)
    assert error.what.startswith("it cannot be read (")


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('[{"a": 1},\n {"a": }]', "", "the file is not JSON (Expecting value in line 2, column 8)"),
        ('[{"a": 1}, 5]', ", row 2", "the row is a int, not an object"),
        ('[{"a": 1}, null]', ", row 2", "the row is a NoneType, not an object"),
        ('["a", "b"]', ", row 1", "the row is a str, not an object"),
        ("[]", "", "it is empty"),
        ("", "", "it is empty"),
        (
            '{\n "a": 1}',
            ", row 1",
            "the line is not JSON (Expecting property name enclosed in double quotes at column 2)",
        ),
    ],
)
def test_a_bad_json_file_is_named_with_its_fault(tmp_path, content, where, what):
    (tmp_path / "a.json").write_text(content)
    error = fault(tmp_path / "a.json")
    assert (error.where, error.what) == (f"{tmp_path / 'a.json'}{where}", what)


def test_text_that_is_not_utf8_is_refused_wherever_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff\xfe"}\n')
    assert "the file cannot be read ('utf-8' codec can't decode" in fault(tmp_path / "a.jsonl").what


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.arrow"])
def test_a_missing_file_is_named(tmp_path, name):
    error = fault(tmp_path / name)
    assert (error.where, error.what) == (str(tmp_path / name), "there is no such file")


def test_tables_with_other_columns_cannot_be_one_source(tmp_path):
    (tmp_path / "set").mkdir()
    arrow_stream(tmp_path / "set" / "0.arrow", [{"a": 1}])
    arrow_stream(tmp_path / "set" / "1.arrow", [{"a": "text"}])
    error = fault(tmp_path / "set")
    assert error.what.startswith("it cannot be read (")
    assert "the same columns" in error.remedy


# Content ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saved", "arrows", "a.parquet"])
def test_a_table_elsewhere_has_the_same_fingerprint_and_another_one_has_not(tmp_path, name):
    prints = []
    for folder, rows in (("one", CHAT), ("two", CHAT), ("three", CHAT[:-1])):
        (tmp_path / folder).mkdir()
        WRITERS[name](tmp_path / folder / name, rows)
        prints.append(open_source(Source("s", path=str(tmp_path / folder / name))).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_large_file_that_changes_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 0)
    path = tmp_path / "a.jsonl"
    for rows in (CHAT, CHAT[::-1]):
        jsonl(path, rows)
        assert load(Source("s", path=str(path))) == rows


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub; records how it was asked."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "org/missing":
            raise ConnectionError("Couldn't reach 'org/missing' on the Hub (OfflineModeIsEnabled)\nmore")
        return datasets.Dataset.from_list(CHAT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    files.hub_set.cache_clear()
    yield asked
    files.hub_set.cache_clear()


def test_a_hub_set_is_asked_for_as_the_source_says(hub):
    source = Source("s", hub="org/set", subset="en", split="test", revision="abc", match={"id": "3"})
    assert load(source) == [CHAT[3]]
    for _ in range(2):  # asked once
        assert load(Source("s", hub="org/set")) == CHAT
    folder = str(cache_dir() / "datasets" / "hub")
    assert hub == [
        (("org/set", "en"), {"split": "test", "revision": "abc", "cache_dir": folder}),
        (("org/set", None), {"split": "train", "revision": None, "cache_dir": folder}),
    ]


def test_the_revision_is_in_a_hub_sets_fingerprint(hub):
    prints = {open_source(Source("s", hub="org/set", revision=revision)).fingerprint for revision in ("a", "b", None)}
    assert len(prints) == 3
    assert all(int(text, 16) for text in prints)


def test_a_hub_set_that_cannot_be_had_is_named_with_the_reason(hub):
    with pytest.raises(InputError) as caught:
        load(Source("chat", hub="org/missing"))
    assert caught.value.where == "source 'chat'"
    reason = "Couldn't reach 'org/missing' on the Hub (OfflineModeIsEnabled)"
    assert caught.value.what == f"org/missing cannot be had from the hub ({reason})"
    assert "give their path" in caught.value.remedy


def test_the_libraries_are_as_loud_afterwards_as_before(tmp_path):
    datasets.logging.set_verbosity(logging.INFO)
    datasets.enable_progress_bars()
    jsonl(Path(tmp_path, "a.jsonl"), CHAT)
    load(Source("s", path=str(tmp_path / "a.jsonl")))
    assert datasets.logging.get_verbosity() == logging.INFO
    assert not datasets.are_progress_bars_disabled()


def test_ordinary_json_lines_go_through_datasets_and_are_memory_mapped_when_large(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "read_lines", None)  # would fail
    monkeypatch.setattr(files, "SMALL", 2000)
    for name, rows, mapped in (("small", CHAT[:5], False), ("large", CHAT, True)):
        jsonl(tmp_path / f"{name}.jsonl", rows)
        found, _ = files.open_file(str(tmp_path / f"{name}.jsonl"), None, str)
        assert isinstance(found, ArrowRows)
        assert bool(found._data.cache_files) == mapped
