import json
from collections import Counter
from itertools import combinations

import pytest

from tulu_lightning.assets.constraints import DRAWS, Dice, clash
from tulu_lightning.data.constraints import constrained
from tulu_lightning.errors import InputError
from tulu_lightning.verifiers.ifeval_rules import RULES
from tulu_lightning.verifiers.registry import check_target, get

ROWS = [{"messages": [{"role": "user", "content": f"Tell me about number {number}."}]} for number in range(300)]


def ids(row) -> list[str]:
    return json.loads(row["ground_truth"])["instruction_id_list"]


def test_a_row_gets_constraints_and_a_target_that_asks_the_same():
    (row,) = constrained(ROWS[:1], kinds=["punctuation:no_comma"])
    text = "Tell me about number 0. Do not use any commas."
    assert row == {
        "messages": [{"role": "user", "content": text}],
        "ground_truth": json.dumps({"prompt": text, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
        "verifier": "ifeval",
        "dataset": "ifeval",
        "constraint": "Do not use any commas.",
    }


def test_all_25_kinds_are_drawn_and_every_target_can_be_used():
    rows = constrained(ROWS, seed=1)
    assert {name for row in rows for name in ids(row)} == set(DRAWS) == set(RULES)
    assert {check_target("ifeval", row["ground_truth"]) for row in rows} == {None}


def test_one_to_three_constraints_that_do_not_clash():
    rows = constrained(ROWS, seed=2)
    counts = Counter(len(ids(row)) for row in rows)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 30
    assert not any(clash(*pair) for row in rows for pair in combinations(ids(row), 2))


def test_clashes_are_seen_from_both_sides():
    for one in DRAWS:
        assert clash(one, one)
        for other in DRAWS:
            assert clash(one, other) == clash(other, one)
    assert clash("change_case:english_capital", "change_case:english_lowercase")
    assert not clash("punctuation:no_comma", "detectable_format:title")


def test_the_drawn_arguments_are_what_the_text_says():
    for row in constrained(ROWS, seed=3):
        for given in json.loads(row["ground_truth"])["kwargs"]:
            for key, value in given.items():
                if isinstance(value, int) or key in ("keyword", "end_phrase", "postscript_marker", "first_word"):
                    assert str(value) in row["constraint"]
                if isinstance(value, list):
                    assert all(word in row["constraint"] for word in value)
                if key.endswith("relation"):
                    assert {"at least": "at least", "less than": "fewer than"}[value] in row["constraint"]


def test_rows_depend_on_the_seed_and_on_nothing_else():
    assert constrained(ROWS, seed=4) == constrained(ROWS, seed=4)
    assert constrained(ROWS, seed=4) != constrained(ROWS, seed=5)
    assert constrained(ROWS, seed=4)[:7] == constrained(ROWS[:7], seed=4)


def test_the_answer_of_a_row_is_dropped_and_earlier_turns_stay():
    earlier = [{"role": "system", "content": "Be kind."}]
    asked = {"role": "user", "content": "One.\nTwo."}
    answered = {"messages": [*earlier, asked, {"role": "assistant", "content": "Three."}]}
    (row,) = constrained([answered], kinds=["combination:repeat_prompt"])
    assert row["messages"][:-1] == earlier
    assert row["messages"][-1]["content"] == f"One.\nTwo.\n\n{row['constraint']}"
    assert get("ifeval")("One.\nTwo.\n\nThree.", row["ground_truth"]).outcome == "right"
    assert answered["messages"][1] == asked  # what was given is left as it was


@pytest.mark.parametrize(
    ("rows", "kinds", "message"),
    [
        (ROWS[:1], ["punctuation:no_coma"], "no constraint 'punctuation:no_coma'. Did you mean 'punctuation:no_comma'"),
        (ROWS[:1], [], "kinds: it is empty"),
        ([ROWS[0], {"messages": []}], ["punctuation:no_comma"], "row 2: it has no user turn"),
        ([{"prompt": "x"}], ["punctuation:no_comma"], "row 1: it has no user turn"),
    ],
)
def test_bad_rows_and_kinds_are_refused(rows, kinds, message):
    with pytest.raises(InputError, match=message):
        constrained(rows, kinds=kinds)


def test_dice_give_every_face_and_different_things():
    dice = Dice("seed")
    assert {dice.below(6) for _ in range(200)} == set(range(6))
    assert len(set(dice.some(range(10), 10))) == 10
    assert [Dice(1).below(1000) for _ in range(3)] == [Dice(1).below(1000)] * 3
