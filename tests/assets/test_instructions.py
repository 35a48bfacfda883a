import json

import pytest

from tulu_lightning.assets.instructions import FORMS, TOPICS, heldout_rows, is_heldout, prompt_rows
from tulu_lightning.errors import InputError
from tulu_lightning.verifiers.registry import check_target, get


def question_of(row) -> str:
    (message,) = row["messages"]
    assert message["role"] == "user"
    return message["content"]


def topic_of(row) -> str:
    return question_of(row).partition(" about ")[2].partition(".")[0]


def everything():
    return prompt_rows(sum(not is_heldout(topic) for topic in TOPICS) * len(FORMS), seed=1)


def test_rows_have_the_documented_form():
    (row,) = prompt_rows(1, seed=3)
    assert row.keys() == {"messages", "ground_truth", "verifier"}
    assert row["verifier"] == "ifeval"
    target = json.loads(row["ground_truth"])
    assert target["prompt"] == question_of(row)
    assert len(target["instruction_id_list"]) == len(target["kwargs"]) == 1


def test_every_target_can_be_used():
    assert {check_target(row["verifier"], row["ground_truth"]) for row in (*everything(), *heldout_rows(100))} == {None}


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ("fewer than 8 words", "Tea is hot.", "Tea is a hot drink made from leaves."),
        ("Do without the word and", "Tea is hot.", "Tea is hot and wet."),
        ("exactly 2 bullet points", "* hot\n* wet", "* hot"),
        ("any commas", "Tea is hot.", "Tea is hot, sometimes."),
        ("Leave out all commas", "Tea is hot.", "Tea is hot, sometimes."),
        ("in double angle brackets", "<<Tea>> It is hot.", "Tea: It is hot."),
        ("last words", "Tea is hot. The end.", "The end, my friend."),
    ],
)
def test_what_the_words_ask_is_what_the_verifier_judges(asked, right, wrong):
    row = next(row for row in everything() if asked in question_of(row))
    verdicts = [get(row["verifier"])(text, row["ground_truth"]).outcome for text in (right, wrong)]
    assert verdicts == ["right", "wrong"]


def test_heldout_topics_never_occur_in_training_whatever_the_seed():
    heldout = {topic for topic in TOPICS if is_heldout(topic)}
    assert len(TOPICS) == len(set(TOPICS)) >= 120
    assert 0.15 < len(heldout) / len(TOPICS) < 0.35
    assert {topic_of(row) for row in heldout_rows(len(heldout) * len(FORMS))} == heldout
    for seed in range(5):
        assert heldout.isdisjoint(map(topic_of, prompt_rows(1000, seed)))


def test_the_split_is_fixed_for_ever():
    # Recorded once: a change of these would leak held-out topics into models trained before it.
    assert [topic for topic in TOPICS if is_heldout(topic)][:5] == ["bread", "eggs", "pasta", "rice", "bats"]


def test_rows_are_a_function_of_the_seed_and_do_not_repeat():
    assert prompt_rows(300, seed=5) == prompt_rows(300, seed=5)
    assert prompt_rows(300, seed=5) != prompt_rows(300, seed=6)
    assert len(set(map(question_of, everything()))) == len(everything())
    assert heldout_rows(100) == heldout_rows(200)[:100]


@pytest.mark.parametrize("make", [prompt_rows, heldout_rows])
@pytest.mark.parametrize("count", [0, 10_000])
def test_more_rows_than_there_are_instructions_are_refused(make, count):
    with pytest.raises(InputError, match=rf"count is {count}, there are \d+ instructions\. Use 1 to \d+"):
        make(count)
