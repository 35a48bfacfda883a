import json
import math
import os
from dataclasses import replace

import pytest

from tulu_lightning.data.criteria import Predicate
from tulu_lightning.data.sources import Source, load, open_source
from tulu_lightning.errors import InputError

SUMS = "tulu_lightning.assets.arithmetic.sft_rows"


def test_a_file_gives_its_objects_in_order(write):
    assert load(write([{"a": 1}, {"b": "\u2028"}])) == [{"a": 1}, {"b": "\u2028"}]


def test_unicode_line_separators_inside_strings_do_not_end_a_row(write):
    assert load(write([json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False)])) == [{"a": "x\u2028y\x85z"}]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n')
    assert load(Source("s", path=str(path))) == [{"a": 1}]


def test_a_function_gives_its_rows():
    rows = load(Source("sums", rows=SUMS, args={"count": 3, "seed": 1}))
    assert len(rows) == 3
    assert rows[0].keys() == {"messages"}


def test_limit_takes_the_first_rows(write):
    path = write([{"a": 1}, {"a": 2}, {"a": 3}]).path
    assert load(Source("s", path=path, limit=2)) == [{"a": 1}, {"a": 2}]
    assert len(load(Source("s", path=path, limit=9))) == 3


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (Source("s"), "source 's': neither path nor hub nor rows is given"),
        (Source("s", path="a", rows="b.c"), "source 's': both path and rows are given"),
        (Source("s", path="a", hub="b/c"), "source 's': both path and hub are given"),
        (Source("s", path="a", limit=0), "source 's': limit is 0"),
        (Source("s", path="a", count=0), "source 's': count is 0"),
        (Source("s", path="a", cap=-1), "source 's': cap is -1"),
        (Source("s", path="a", fraction=1.5), r"source 's': fraction is 1\.5. .*above 0, to 1"),
        (Source("s", path="a", fraction=-0.5), r"source 's': fraction is -0\.5"),
        (Source("s", path="a", fraction=0.0), r"source 's': fraction is 0\.0"),
        (Source("s", path="a", fraction=math.nan), "source 's': fraction is nan"),
        (Source("s", path="a", upsample=0.5), r"source 's': upsample is 0\.5.*set fraction, count or cap"),
        (Source("s", path="a", upsample=math.inf), "source 's': upsample is inf"),
        (Source("s", path="a", upsample=1e9), r"source 's': upsample is 1000000000\.0. Use 1 to 1,000"),
        (Source("s", path="a", count=3, cap=3), "source 's': both count and cap are given"),
        (Source("s", path="a", fraction=0.5, cap=3), "source 's': both fraction and cap are given"),
        (Source("s", path="a", revision="main"), "source 's': revision does nothing for a source without hub"),
        (Source("s", rows=SUMS, split="train"), "source 's': split does nothing for a source without hub"),
        (Source("s", path="pyproject.toml", split="test"), "pyproject.toml: split is 'test', and a file has none"),
        (Source("s", path="a", read="sharegtp"), "there is no format 'sharegtp'. Did you mean 'sharegpt'"),
        (Source("s", path="a", read="no_such_module.f"), "source 's', read: no_such_module.f cannot be imported"),
        (Source("s", path="a", filters=[Predicate("json.lods")]), "json.lods is not a function"),
        (Source("s", hub="b/c", args={"count": 1}), "source 's': args do nothing for a hub set"),
        (Source("s", path="a", args={"count": 1}), "source 's': args do nothing for a file"),
        (Source("s", path="nowhere/a.jsonl"), "nowhere/a.jsonl: there is no such file"),
        (Source("s", path="tests"), "tests: the folder has no rows that can be read"),
        (Source("s", path="tests/*.parquet"), r"tests/\*.parquet: there is no such file"),
        (Source("s", rows="sft_rows"), "source 's': sft_rows cannot be imported"),
        (Source("s", rows="no_such_module.f"), "no_such_module.f cannot be imported"),
        (Source("s", rows=SUMS + "x"), f"{SUMS}x is not a function"),
        (
            Source("s", rows=SUMS, args={"count": 3, "sed": 1}),
            "cannot be called with these args .*'sed'.*It takes .count",
        ),
        (Source("s", rows=SUMS, args={"count": 0}), "count is 0"),
        (Source("s", rows="collections.Counter"), "collections.Counter returned a Counter"),
        (Source("s", rows="heapq.merge"), "heapq.merge returned a generator"),
        (Source("s", rows="glob.glob", args={"pathname": "/nowhere/*"}), "source 's': it is empty"),
        (Source("s", rows="builtins.dict"), "builtins.dict is built in and names no parameters"),
    ],
)
def test_a_bad_source_is_named_with_its_fault(source, complaint):
    with pytest.raises(InputError, match=complaint):
        load(source)


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="it is empty") as caught:
        load(Source("s", path=str(path)))
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"a": 1', "the line is not JSON"),
        ("", "the line is empty"),
        ("[1]", "the row is a list, not an object"),
        ("null", "the row is a NoneType, not an object"),
    ],
)
def test_a_bad_line_is_named_by_its_row(write, line, complaint):
    source = write([{"a": 1}] * 16 + [line] + [{"a": 1}] * 3)
    with pytest.raises(InputError, match=complaint) as caught:
        load(source)
    assert caught.value.where == f"{source.path}, row 17"


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "binary.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load(Source("s", path=str(path)))


def test_rows_that_are_not_objects_are_named_also_from_a_function(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text("def rows(): return [{'a': 1}, [2]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="source 's', row 2: the row is a list, not an object"):
        load(Source("s", rows="my_rows.rows"))


# Columns, matches and limits ----------------------------------------------------------------------------------------


def test_columns_are_found_under_other_names(write):
    source = write([{"conversation": "a", "id": 1}, {"id": 2}])
    renamed = replace(source, columns={"messages": "conversation"})
    assert load(renamed) == [{"conversation": "a", "id": 1, "messages": "a"}, {"id": 2}]


def test_a_field_of_the_wanted_name_does_not_stand_in_for_the_named_column(write):
    renamed = replace(write([{"text": "a", "body": "b"}, {"text": "c"}]), columns={"text": "body"})
    assert load(renamed) == [{"text": "b", "body": "b"}, {}]


@pytest.mark.parametrize("setting", [{"columns": {"messages": "conversatoin"}}, {"match": {"conversatoin": "a"}}])
def test_an_unknown_column_is_named_with_those_there_and_the_nearest(write, setting):
    source = replace(write([{"conversation": "a", "id": 1}]), **setting)
    with pytest.raises(InputError, match=r"there are conversation, id\).*Did you mean 'conversation'\?") as caught:
        open_source(source)
    assert caught.value.where == source.path
    assert "conversatoin" in caught.value.what


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"source": "x"}, [1, 4]),
        ({"source": ["x", "y"]}, [1, 2, 4]),
        ({"source": "x", "good": "true"}, [4]),
        ({"number": "7"}, [2]),
    ],
)
@pytest.mark.parametrize("how", ["file", "function"])
def test_match_keeps_the_rows_with_the_value_and_their_numbers(write, monkeypatch, tmp_path, how, match, expected):
    rows = [
        {"id": 1, "source": "x", "good": False},
        {"id": 2, "source": "y", "number": 7},
        {"id": 3, "source": None},
        {"id": 4, "source": "x", "good": True},
    ]
    (tmp_path / "matched_rows.py").write_text(f"def rows(): return {rows!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = write(rows) if how == "file" else Source("s", rows="matched_rows.rows")
    table = open_source(replace(source, match=match))
    assert [row["id"] for row in table.take(range(len(table)))] == expected
    assert [table.number(index) for index in range(len(table))] == expected


def test_a_value_that_no_row_has_is_offered_the_nearest(write):
    source = write([{"source": "oasst1_converted"}, {"source": "flan"}])
    with pytest.raises(InputError, match=r"no row has 'oast1_converted' as its 'source'. Did you mean 'oasst1_con"):
        open_source(replace(source, match={"source": ["flan", "oast1_converted"]}))
    crossed = replace(write([{"a": "1", "b": "1"}, {"a": "2", "b": "2"}]), match={"a": "1", "b": "2"})
    with pytest.raises(InputError, match="no row matches all of"):
        open_source(crossed)


def test_limit_counts_the_rows_that_match(write):
    source = replace(write([{"n": i, "even": str(i % 2 == 0)} for i in range(10)]), match={"even": "True"}, limit=3)
    assert [row["n"] for row in load(source)] == [0, 2, 4]


def test_rows_can_be_taken_in_any_order(write):
    table = open_source(write([{"n": i} for i in range(10)]))
    assert [row["n"] for row in table.take([7, 0, 7, 3])] == [7, 0, 7, 3]
    assert [row["n"] for row in table.take(range(2, 8, 3))] == [2, 5]
    assert [row["n"] for row in table.take(range(8, 10))] == [8, 9]
    assert table.take([]) == table.take(range(3, 3)) == []


# Fingerprints -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_not_of_path_or_time(write):
    one, two = write([{"a": 1}], "one"), write([{"a": 1}], "two")
    os.utime(two.path, (1, 1))
    first = open_source(one).fingerprint
    assert open_source(two).fingerprint == first
    assert int(first, 16)
    assert open_source(write([{"a": 2}], "two")).fingerprint != first


@pytest.mark.parametrize("setting", [{"limit": 1}, {"columns": {"b": "a"}}, {"match": {"a": "1"}}])
def test_what_selects_and_renames_is_in_the_fingerprint(write, setting):
    source = write([{"a": "1"}])
    assert open_source(replace(source, **setting)).fingerprint != open_source(source).fingerprint


def test_a_functions_fingerprint_is_of_its_rows(monkeypatch, tmp_path):
    (tmp_path / "some_rows.py").write_text("def rows(x, y): return [{'a': x, 'b': y}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    prints = [
        open_source(Source("s", rows="some_rows.rows", args=args)).fingerprint
        for args in ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 1, "y": 3})
    ]
    assert prints[0] == prints[1] != prints[2]
