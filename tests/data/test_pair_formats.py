"""Preference rows of every format come out as the two conversations that they mean, or are refused by name."""

import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.assets.rows import ARCHIVE, preference_rows
from tulu_lightning.data.criteria import Keywords
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.pair_formats import IdPair, Pair, to_pair
from tulu_lightning.data.sources import Source, load
from tulu_lightning.errors import InputError


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
Q, GOOD, BAD = user("q"), assistant("good"), assistant("bad")
PAIR = Pair([Q, GOOD], [Q, BAD])


def read(row, how="messages", **settings):
    return to_pair(Source("s", path="rows.jsonl", read=how, **settings), 17, row)


def fault(row, how="messages") -> str:
    with pytest.raises(InputError) as caught:
        read(row, how)
    assert caught.value.where == "rows.jsonl, row 17"
    assert caught.value.remedy
    return caught.value.what


def reason(row, how="messages") -> str:
    with pytest.raises(LeftOut) as caught:
        read(row, how)
    return str(caught.value)


# Messages -----------------------------------------------------------------------------------------------------------


def test_whole_conversations_are_read_as_they_are_and_a_text_beside_them_is_ignored():
    row = {"chosen": [SYSTEM, Q, GOOD], "rejected": [SYSTEM, Q, BAD]}
    expected = Pair(row["chosen"], row["rejected"])
    assert read(row) == expected
    assert read({**row, "prompt": "not what they say"}) == expected  # as in Tülu's mixtures: prompt is for people
    assert read({**row, "prompt": [SYSTEM, Q]}) == expected


@pytest.mark.parametrize("prompt", ["q", [Q]])
@pytest.mark.parametrize("chosen", ["good", [GOOD]])
@pytest.mark.parametrize("rejected", ["bad", [BAD]])
def test_an_answer_may_be_text_or_messages_and_so_may_the_prompt(prompt, chosen, rejected):
    assert read({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == PAIR


def test_what_the_assistant_says_in_a_prompt_is_context():
    prompt = [SYSTEM, Q, assistant("a"), user("r")]
    context = [SYSTEM, Q, assistant("a", weight=0.0), user("r")]
    assert read({"prompt": prompt, "chosen": "good", "rejected": "bad"}) == Pair([*context, GOOD], [*context, BAD])


def test_sides_may_go_on_for_several_turns_and_part_anywhere_after_the_first_question():
    longer, other = [GOOD, user("r"), assistant("b")], [GOOD, user("another"), assistant("c"), user("s"), GOOD]
    assert read({"prompt": "q", "chosen": longer, "rejected": other}) == Pair([Q, *longer], [Q, *other])
    assert read({"chosen": [Q, *longer], "rejected": [Q, *other]}) == Pair([Q, *longer], [Q, *other])
    assert read({"prompt": "q", "chosen": longer, "rejected": "bad"}) == Pair([Q, *longer], [Q, BAD])


def test_a_message_of_weight_0_is_context_and_no_other_weight_than_1_is_known():
    row = {"chosen": [Q, assistant("a", train=False), user("r"), assistant("b", weight=1)], "rejected": [Q, BAD]}
    assert [message.get("weight") for message in read(row).chosen] == [None, 0.0, None, 1.0]
    row["chosen"][1] = assistant("a", weight=0.5)
    assert fault(row) == "chosen[1] has the weight 0.5, and an answer of a pair counts in full or not at all"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": "a", "rejected": "b"}, "the row has no field 'prompt' (it has chosen, rejected)"),
        ({"prompt": "q", "rejected": "b"}, "the row has no field 'chosen' (it has prompt, rejected)"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is 3, not a list of messages"),
        ({"prompt": [Q, GOOD], "chosen": "a", "rejected": "b"}, "prompt ends with an assistant turn"),
        ({"prompt": "q", "chosen": "a", "rejected": 7}, "rejected is 7, not a list of messages"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen is [], not a list of messages"),
        ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, "chosen[0] is 'a'"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "chosen has half of a surrogate pair at character 1, which no tokenizer can read"),
        ({"prompt": "q", "chosen": [Q, GOOD], "rejected": "b"}, "chosen is a whole conversation and rejected is an answer alone"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [Q, BAD]}, "rejected is a whole conversation and chosen is an answer alone"),
        ({"chosen": [Q, GOOD, user("r")], "rejected": [Q, BAD]}, "chosen ends with a user turn"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD, user("r")]}, "rejected ends with a user turn"),
        ({"chosen": [Q, {"role": "asistant", "content": "a"}], "rejected": [Q, BAD]}, "chosen[1] has the role 'asistant', which does not exist"),
        (
            {"prompt": [user("p")], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
            "prompt is not what chosen begins with: message 1 is user 'p' in prompt and user 'q' in chosen",
        ),
        (
            {"prompt": [Q, GOOD, user("r")], "chosen": [Q, GOOD, user("r"), GOOD], "rejected": [Q, BAD]},
            "prompt is not what rejected begins with: message 2 is assistant 'good' in prompt and assistant 'bad' in rejected",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "high"}, "score_chosen is 'high', not a number"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(row, what):
    assert fault(row) == what


def test_prompts_that_differ_between_the_two_sides_are_refused_with_the_message_and_both_texts():
    start = "the prompts differ between the two sides: message"
    row = {"chosen": [SYSTEM, Q, GOOD], "rejected": [SYSTEM, user("r"), BAD]}
    assert fault(row) == f"{start} 2 is user 'q' in chosen and user 'r' in rejected"
    row["rejected"] = [Q, BAD]
    assert fault(row) == f"{start} 1 is system 'Be brief.' in chosen and user 'q' in rejected"
    row["rejected"] = [SYSTEM, Q, user("more"), BAD]
    assert fault(row) == f"{start} 3 is none in chosen and user 'more' in rejected"
    long = "x" * 500
    row = {"chosen": [user(f"{long}a"), GOOD], "rejected": [user(f"{long}b{long}"), BAD]}
    shortened = f"'...{'x' * 20}b{'x' * 32}..."  # 60 characters from shortly before the difference, with the quote
    assert fault(row) == f"{start} 1 is user '...{'x' * 20}a' in chosen and user {shortened} in rejected"


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ("same", "same", "with equal answers"),
        ("", "bad", "with an empty answer"),
        ("good", " \n", "with an empty answer"),
        ([GOOD, user("r"), assistant("")], "bad", "with an empty answer"),
        ([GOOD, user("r"), BAD], [GOOD, user("r"), assistant("bad", weight=0)], "with equal answers"),
    ],
)
def test_pairs_that_teach_nothing_are_left_out(chosen, rejected, why):
    assert reason({"prompt": "q", "chosen": chosen, "rejected": rejected}) == why


def test_the_binarised_form_of_ultrafeedback_is_messages_and_a_tie_is_left_out():
    row = {"prompt": "q", "prompt_id": "ab", "chosen": [Q, GOOD], "rejected": [Q, BAD], "messages": [Q, GOOD]}
    assert read({**row, "score_chosen": 8.5, "score_rejected": 7}) == PAIR
    assert reason({**row, "score_chosen": 7.0, "score_rejected": 7}) == "with a tie"
    swapped = "whose rejected answer has the higher score"
    assert reason({**row, "score_chosen": 7.0, "score_rejected": 8.5}) == swapped
    assert read({**row, "score_chosen": 7.0}) == PAIR


# Token ids ------------------------------------------------------------------------------------------------------------

IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}


def test_token_ids_win_over_text():
    assert read({**IDS, "prompt": "q", "chosen": "good", "rejected": 3}) == IdPair([1, 2], [3], [4])


def test_filters_read_the_text_beside_token_ids():
    filters = [Keywords(["x"])]
    row = {**IDS, "prompt": "q", "chosen": "good", "rejected": "bad"}
    assert read(row, filters=filters) == IdPair([1, 2], [3], [4], PAIR)
    with pytest.raises(InputError, match="the row has no field 'chosen'"):
        read(IDS, filters=filters)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"chosen_ids": [2.0]}, "chosen_ids is [2.0], not a list of token ids"),
        ({"chosen_ids": [-2]}, "chosen_ids is [-2], not a list of token ids"),
        ({"chosen_ids": "12"}, "chosen_ids is '12', not a list of token ids"),
    ],
)
def test_token_ids_that_are_none_are_refused(change, what):
    assert fault({**IDS, **change}) == what


def test_token_ids_are_given_for_all_three_parts_and_none_is_empty():
    assert fault({"prompt_ids": [1], "chosen_ids": [2]}) == (
        "the row has no field 'rejected_ids' (it has prompt_ids, chosen_ids)"
    )
    assert reason({**IDS, "rejected_ids": []}) == "with an empty answer"
    assert reason({**IDS, "score_chosen": 1, "score_rejected": 1}) == "with a tie"


# ShareGPT -------------------------------------------------------------------------------------------------------------


def said(speaker, text, **more):
    return {"from": speaker, "value": text, **more}


def test_a_sharegpt_pair_is_a_conversation_and_two_answers():
    row = {"conversations": [said("human", "q")], "chosen": said("gpt", "good"), "rejected": said("gpt", "bad")}
    assert read(row, "sharegpt") == PAIR
    assert read({**row, "system": "Be brief."}, "sharegpt") == Pair([SYSTEM, Q, GOOD], [SYSTEM, Q, BAD])
    row["conversations"] = [said("system", "Be brief."), said("human", "q"), said("gpt", "a"), said("human", "r")]
    row["rejected"] = [said("gpt", "bad"), said("human", "s"), said("gpt", "worse")]
    context = [SYSTEM, Q, assistant("a", weight=0.0), user("r")]
    expected = Pair([*context, GOOD], [*context, BAD, user("s"), assistant("worse")])
    assert read(row, "sharegpt") == expected


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"conversations": "q"}, "conversations is 'q', not a list of turns"),
        ({"conversations": [said("human", "q"), said("gpt", "a")]}, "prompt ends with an assistant turn"),
        ({"chosen": "good"}, "chosen is 'good'"),
        ({"chosen": said("robot", "good")}, "chosen is from 'robot', which does not exist"),
        ({"rejected": [said("gpt", 3)]}, "value of rejected is 3, not text"),
    ],
)
def test_a_bad_sharegpt_pair(change, what):
    row = {"conversations": [said("human", "q")], "chosen": said("gpt", "good"), "rejected": said("gpt", "bad")}
    assert fault({**row, **change}, "sharegpt") == what


# UltraFeedback --------------------------------------------------------------------------------------------------------


def completion(text, score=None, ratings=None):
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {name: {"Rating": rating} for name, rating in zip(aspects, ratings or (), strict=False)}
    return {"response": text, "annotations": annotations, **({} if score is None else {"overall_score": score})}


def judged(*completions, instruction="q"):
    return {"instruction": instruction, "completions": list(completions)}


def answers(row) -> tuple[str, str]:
    chosen, rejected = read(row, "ultrafeedback")
    assert chosen[:-1] == rejected[:-1] == [user(row["instruction"])]
    return chosen[-1]["content"], rejected[-1]["content"]


def test_ultrafeedback_pairs_the_highest_score_with_one_of_the_lower_ones():
    assert answers(judged(completion("a", 5.0), completion("b", 8.5))) == ("b", "a")
    rows = [judged(*map(completion, "abcd", (7, 9, 9, 3)), instruction=f"q{i}") for i in range(200)]
    drawn = Counter(answers(row) for row in rows)
    assert set(drawn) == {("b", "a"), ("b", "d")}  # never c, which is as good as b
    assert all(70 < times < 130 for times in drawn.values())  # 100 ± 4 standard deviations of 7
    assert [answers(row) for row in rows] == [answers(json.loads(json.dumps(row, sort_keys=True))) for row in rows]


def test_without_overall_scores_the_mean_rating_of_the_aspects_decides():
    best, worse = completion("a", ratings=["4", "N/A", "5", "5"]), completion("b", ratings=["5", "5", "4", "4"])
    assert answers(judged(worse, best)) == ("a", "b")  # 14/3 and 18/4
    assert answers(judged({**worse, "overall_score": 9}, best)) == ("a", "b")  # one has no overall score: ratings
    assert answers(judged({**worse, "overall_score": 9}, {**best, "overall_score": 8})) == ("b", "a")


def test_ultrafeedback_rows_that_teach_nothing_are_left_out():
    assert reason(judged(completion("a", 5), completion("b", 5)), "ultrafeedback") == "with a tie"
    few = "with fewer than two scored answers"
    assert reason(judged(completion("a", 5)), "ultrafeedback") == few
    assert reason(judged(completion("a", ratings=["N/A"]), completion("b", ratings=["3"])), "ultrafeedback") == few
    assert reason(judged(completion(" ", 2), completion("b", 5)), "ultrafeedback") == few
    assert reason(judged(completion("a", 5), completion("a", 4)), "ultrafeedback") == "with equal answers"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "q"}, "the row has no field 'completions' (it has instruction)"),
        ({"instruction": "q", "completions": []}, "completions is [], not a list of completions"),
        (judged(completion("a", 5), {"text": "b"}), "completions[1] is {'text': 'b'}"),
        (judged(completion("a", 5), completion(3, 4)), "response of completions[1] is 3, not text"),
        (judged(completion("a", 5), completion("b", 4), instruction=7), "instruction is 7, not text"),
    ],
)
def test_a_bad_ultrafeedback_row(row, what):
    assert fault(row, "ultrafeedback") == what


# A reader of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture
def my_pairs(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "my_pairs.py").write_text(
        "def by_votes(row):\n"
        "    if row['votes'] == 0:\n"
        "        return None\n"
        "    a, b = (row['a'], row['b']) if row['votes'] > 0 else (row['b'], row['a'])\n"
        "    return {'prompt': row['q'], 'chosen': a, 'rejected': b}\n"
        "def ids(row):\n"
        "    return {'prompt_ids': [1], 'chosen_ids': [2], 'rejected_ids': [3]}\n"
        "def listing(row):\n"
        "    return [row]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_reader_of_ones_own_gives_a_pair_or_leaves_the_row_out(my_pairs):
    row = {"q": "q", "a": "bad", "b": "good", "votes": -2}
    assert read(row, "my_pairs.by_votes") == PAIR
    assert reason({**row, "votes": 0}, "my_pairs.by_votes") == "by its reader"
    assert read(row, "my_pairs.ids") == IdPair([1], [2], [3])
    assert fault({}, "my_pairs.by_votes") == "my_pairs.by_votes fails on it (KeyError: 'votes')"
    with pytest.raises(InputError, match=r"returned a list\. It must return a row with chosen and rejected, or None"):
        read(row, "my_pairs.listing")


# Real sets ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`real(name)` is a source over a file of the package with chat rows, unpacked."""
    archive = cache_dir() / "packages" / ARCHIVE
    if not archive.is_file():
        pytest.skip("the package is not in the cache")
    folder = tmp_path_factory.mktemp("real")

    def unpack(name, **settings):
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"llamafactory-0.9.5/data/{name}")
            assert member is not None
            Path(folder, name).write_bytes(member.read())
        return Source("real", path=str(folder / name), **settings)

    return unpack


def test_real_sharegpt_pairs_are_those_that_preference_rows_gives(real):
    source = real("dpo_en_demo.json", read="sharegpt")
    rows = load(source)
    read = [to_pair(source, number, row) for number, row in enumerate(rows, start=1)]
    assert len(read) == 300
    assert sum(len(pair.chosen) > 2 for pair in read) == 186  # with a system message or several turns
    asset = replace(source, read="messages")
    twins = [to_pair(asset, number, row) for number, row in enumerate(preference_rows(), start=1)]
    assert sorted(map(repr, twins)) == sorted(map(repr, read))
    for row, (chosen, rejected) in zip(rows, read, strict=True):
        spoken = [turn["value"] for turn in row["conversations"]]
        assert [message["content"] for message in chosen] == [*spoken, row["chosen"]["value"]]
        assert [message["content"] for message in rejected] == [*spoken, row["rejected"]["value"]]


def test_real_whole_conversations_of_parts_are_read_under_other_column_names(real):
    columns = {"chosen": "chosen_messages", "rejected": "rejected_messages"}
    source = real("v1_dpo_demo.jsonl", columns=columns)
    read = [to_pair(source, number, row) for number, row in enumerate(load(source), start=1)]
    assert len(read) == 10
    assert {message.get("weight") for pair in read for side in pair for message in side} == {None, 1.0}
