"""Rows that the user gives: what files are read, in whose form, and what is refused because it would be scored falsely."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.rows import rows_of
from tulu_lightning.evaluation.suite import find_task

MMLU_PRO_ROW = {"question_id": 70, "question": "Which?", "options": ["one", "two"], "answer": "B", "category": "law"}


def test_rows_are_read_from_parquet_tsv_and_lines_as_the_hub_publishes_them(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([MMLU_PRO_ROW]), tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text('adversarial\tlabel\n"say ""hi"", now"\t1\n')
    (tmp_path / "a.json").write_text('{"index": 0}\n{"index": 1}\n')
    read = [rows_of(tmp_path / name) for name in ("a.parquet", "a.tsv", "a.json")]
    assert read == [[MMLU_PRO_ROW], [{"adversarial": 'say "hi", now', "label": "1"}], [{"index": 0}, {"index": 1}]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"{}", r"a\.parquet: it cannot be read"),
        ("a.csv", b"\xff\xfe", r"a\.csv: it cannot be read"),
        ("a.json", b'[{"a": 1', r"a\.json: the file is not JSON"),
        ("a.jsonl", b"\x00\xff", r"a\.jsonl: the file cannot be read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        rows_of(tmp_path / name)


def test_a_given_file_may_be_as_the_hub_publishes_it(give):
    spans = {"spans": ["12", "13"], "types": ["number", "number"]}
    give("drop", [{"section_id": "s", "query_id": "q", "passage": "P.", "question": "Q?", "answers_spans": spans}])
    nulls = {"num_words": None, "relation": None}
    row = {"key": 1, "prompt": "Hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [nulls]}
    give("ifeval", [row])
    (drop,), (ifeval,) = find_task("drop").examples(), find_task("ifeval").examples()
    assert json.loads(drop.target) == [["12"], ["13"]]
    assert json.loads(ifeval.target)["kwargs"] == [{}]
    give("drop", [{"query_id": "q", "passage": "P.", "question": "Q?", "answers": [["a", "b"]]}])
    assert [json.loads(example.target) for example in find_task("drop").examples()] == [[["a", "b"]]]


MMLU_ROW = {"question": "Which?", "subject": "anatomy", "choices": ["one", "two", "three"], "answer": 1}
BOXLESS = {"problem": "1 + 1?", "solution": "It is 2.", "type": "Algebra", "level": "1"}
COUNTED = {"key": 1, "prompt": "Hi.", "instruction_id_list": ["count:words"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("mmlu_pro", [MMLU_PRO_ROW | {"options": "['one', 'two']"}], r"row 1: .*the options are the text .*not a list"),
        ("mmlu_pro", [MMLU_PRO_ROW | {"options": list("abcdefghijk")}], "row 1: .*it has 11 options"),
        ("mmlu", [MMLU_ROW], r"row 1: is not as the task reads it .*\(it has: question, subject, choices, answer\)"),
        ("math", [BOXLESS], "row 1: .*no .boxed answer"),
        ("popqa", [{"id": 1}], "a row has no field 'prop_id'"),
        ("ifeval", [COUNTED], r"ifeval/1: .*count:words.* Correct the row"),
        ("mmlu_pro", [MMLU_PRO_ROW | {"answer": None}], "mmlu_pro/70: its target is None"),
        ("mmlu_pro", [MMLU_PRO_ROW | {"answer": "all"}], r"mmlu_pro/70: 'all'"),
        ("mmlu_pro", [MMLU_PRO_ROW, MMLU_PRO_ROW | {"question": "Who?"}], "mmlu_pro/70: two rows .* are called so"),
    ],
)
def test_rows_that_would_be_asked_or_scored_falsely_are_refused(give, task, rows, said):
    give(task, rows)
    with pytest.raises(InputError, match=said):
        find_task(task).examples()
