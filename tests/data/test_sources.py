import json

import pytest

from tulu_lightning.data.sources import Source, load
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
        (Source("s"), "source 's': neither path nor rows is given"),
        (Source("s", path="a", rows="b.c"), "source 's': both path and rows are given"),
        (Source("s", path="a", limit=0), "source 's': limit is 0"),
        (Source("s", path="a", args={"count": 1}), "source 's': args do nothing for a file"),
        (Source("s", path="nowhere/a.jsonl"), "nowhere/a.jsonl: there is no such file"),
        (Source("s", path="."), r"\.: the file cannot be read"),
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
