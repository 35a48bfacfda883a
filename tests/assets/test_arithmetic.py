import re

import pytest

from tulu_lightning.assets.arithmetic import heldout_rows, is_heldout, pair_rows, prompt_rows, sft_rows
from tulu_lightning.errors import InputError


def question_of(row) -> str:
    return (row.get("messages") or row["prompt"])[0]["content"]


def operands(row) -> tuple[int, int]:
    """The pair behind a row, without its order."""
    a, b = map(int, re.match(r"What is (\d\d) [+-] (\d\d)\? Reply with only the number\.$", question_of(row)).groups())
    return min(a, b), max(a, b)


def test_rows_have_the_documented_form():
    (row,) = prompt_rows(1, seed=3)
    a, b = map(int, re.findall(r"\d+", question_of(row)))
    assert row == {
        "messages": [{"role": "user", "content": f"What is {a} + {b}? Reply with only the number."}],
        "ground_truth": str(a + b),
        "verifier": "last_number",
    }
    assert [message["role"] for message in sft_rows(1)[0]["messages"]] == ["user", "assistant"]


def test_answers_are_right():
    for row in sft_rows(500, seed=1, operations="+-"):
        question, answer = (message["content"] for message in row["messages"])
        a, operation, b = re.match(r"What is (\d+) ([+-]) (\d+)\?", question).groups()
        assert int(answer) == int(a) + int(b) * (1 if operation == "+" else -1)
        assert int(answer) >= 0


def test_subtractions_come_only_when_asked_for():
    assert not any("-" in question_of(row) for row in sft_rows(2000))
    share = sum("-" in question_of(row) for row in sft_rows(2000, operations="+-")) / 2000
    assert 0.25 < share < 0.42  # a >= b holds for half of the ordered pairs, so one question in three


def test_heldout_pairs_and_their_commutes_never_occur_in_training_whatever_the_seed():
    heldout = {operands(row) for row in heldout_rows(767)}
    assert len(heldout) == 767  # all there are
    for seed in range(8):
        rows = [
            *sft_rows(3000, seed),
            *prompt_rows(3000, seed + 1000),
            *pair_rows(3000, seed + 2000, operations="+-"),
        ]
        assert heldout.isdisjoint(map(operands, rows))


def test_the_split_does_not_see_the_order_and_holds_out_about_a_fifth():
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert all(is_heldout(a, b) == is_heldout(b, a) for a, b in pairs)
    assert 0.17 < sum(is_heldout(a, b) for a, b in pairs) / len(pairs) < 0.23


def test_the_split_is_fixed_for_ever():
    # Recorded once: a change of these would leak held-out pairs into models trained before it.
    assert [question_of(row)[8:15] for row in heldout_rows(3)] == ["85 + 72", "12 + 42", "97 + 21"]


def test_heldout_rows_grow_by_appending():
    assert heldout_rows(200) == heldout_rows(400)[:200]


def test_heldout_rows_put_either_operand_first():
    rows = [tuple(map(int, re.findall(r"\d+", question_of(row)))) for row in heldout_rows(400)]
    assert 0.35 < sum(a > b for a, b in rows) / 400 < 0.65


def test_rows_are_a_function_of_the_seed_and_do_not_repeat():
    assert sft_rows(300, seed=5) == sft_rows(300, seed=5)
    assert sft_rows(300, seed=5) != sft_rows(300, seed=6)
    assert len({question_of(row) for row in sft_rows(3000)}) == 3000


def test_the_rejected_number_is_wrong_and_near():
    for row in pair_rows(500):
        a, b = operands(row)
        assert row["chosen"] == str(a + b)
        assert abs(int(row["rejected"]) - (a + b)) in (1, 2, 10)


@pytest.mark.parametrize("make", [sft_rows, prompt_rows, pair_rows, heldout_rows])
@pytest.mark.parametrize("count", [0, 10_000])
def test_more_rows_than_there_are_questions_are_refused(make, count):
    with pytest.raises(InputError, match=rf"count is {count}, there are \d+ questions\. Use 1 to \d+"):
        make(count)


def test_an_unknown_operation_is_refused():
    with pytest.raises(InputError, match="operations is '\\*'"):
        sft_rows(1, operations="*")
