"""The three segments of a pair: together they are each side alone, and nothing else decides what is scored."""

import logging
import random
import shutil
from dataclasses import replace

import pytest
import torch
from chat_tokenizers import llama3_bytes, turns

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.core.reduce import pair_sum
from tulu_lightning.data import chat, pairs
from tulu_lightning.data.chat import Encoded
from tulu_lightning.data.criteria import Keywords
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
SETTINGS = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 400, "examples_per_step": 4}
START = 25  # "<|user|>\nq\n<|assistant|>\n" in tokens of bytes
TEMPLATES = pytest.mark.parametrize("template", ["tulu", "chatml", "smollm2"])
Side = tuple[list[int], list[float]]


def pair(chosen, rejected, prompt="q") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def whole(chosen: list, rejected: list) -> dict:
    return {"chosen": chosen, "rejected": rejected}


@pytest.fixture
def make(write):
    """Preference data over the given rows, with any setting changed."""
    return lambda rows, **settings: PreferenceData(sources=[write(rows)], **{**SETTINGS, **settings})


def sides(document: Document) -> tuple[Side, Side]:
    """Ids and weights of each side, put together again."""
    start, *rests = document.segments
    assert [segment.parent for segment in document.segments] == [-1, 0, 0]
    assert all(len(segment.ids_L) for segment in document.segments)
    chosen, rejected = (
        (torch.cat([start.ids_L, rest.ids_L]).tolist(), torch.cat([start.weights_L, rest.weights_L]).tolist())
        for rest in rests
    )
    return chosen, rejected


def alone(messages, template="tulu", **settings) -> Side:
    """A side as SFT renders it, without what comes after its last trained token."""
    (row,) = chat.encode_many(TOKENIZER, chat.chat_template(template, TOKENIZER), [messages], **settings)
    end = max(at for at, weight in enumerate(row.weights) if weight) + 1
    return row.ids[:end], row.weights[:end]


def text(rng: random.Random, ending: str) -> str:
    return "".join(rng.choice("ab é\n日") for _ in range(rng.randrange(1, 20))) + ending


def random_rows(count: int, seed: int = 0) -> list[dict]:
    """Whole conversations of one to three turns that part anywhere."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        spoken = [text(rng, ".") for _ in range(rng.choice([2, 4, 6]))]
        part = rng.randrange(1, len(spoken))
        other = [*spoken[:part], *(text(rng, "!") for _ in spoken[part:])]
        rows.append(whole(turns(*spoken), turns(*other)))
    return rows


# Segments -------------------------------------------------------------------------------------------------------------


def test_a_document_is_what_both_sides_begin_with_and_the_rest_of_each(make):
    (document,) = make([pair("good", "go on")]).documents
    parts = [(TOKENIZER.decode(segment.ids_L), segment.weights_L.tolist()) for segment in document.segments]
    assert parts == [
        ("<|user|>\nq\n<|assistant|>\ngo", [0.0] * START + [1.0] * 2),
        ("od<|im_end|>", [1.0] * 3),
        (" on<|im_end|>", [1.0] * 4),
    ]


@TEMPLATES
@pytest.mark.parametrize("train", ["all", "last"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_start_and_rest_are_each_side_as_sft_renders_it(make, template, train, share_prefix):
    rows = random_rows(40)
    data = make(rows, template=template, train=train, share_prefix=share_prefix)
    for row, document in zip(rows, data.documents, strict=True):
        assert sides(document) == (
            alone(row["chosen"], template, train=train),
            alone(row["rejected"], template, train=train),
        )


@TEMPLATES
def test_a_side_is_an_sft_row_without_what_follows_its_last_end_token(make, write, template):
    rows = random_rows(10, seed=1)
    for side, place in (("chosen", 0), ("rejected", 1)):
        own = [{"messages": row[side]} for row in rows]
        sft = SFTData(sources=[write(own, side)], **{**SETTINGS, "template": template})
        for document, twin in zip(make(rows, template=template).documents, sft.documents, strict=True):
            ids, weights = sides(document)[place]
            (segment,) = twin.segments
            assert segment.ids_L[: len(ids)].tolist() == ids
            assert segment.weights_L[: len(ids)].tolist() == weights
            assert not segment.weights_L[len(ids) :].any()
            assert ids[-1] == END


@TEMPLATES
def test_prompt_and_two_texts_give_the_ids_of_the_prompt_and_of_each_answer_alone(make, template):
    """What a document of a prompt and two answers was before whole conversations could be read."""
    bound = chat.chat_template(template, TOKENIZER)
    prompts = [turns("q"), turns("q", "a", "r"), [{"role": "system", "content": "s"}, *turns("x\n")]]
    rows = [pair("good", "go on", prompt) for prompt in prompts]
    for row, document in zip(rows, make(rows, template=template).documents, strict=True):
        prompt, _ = chat.encode(TOKENIZER, bound, row["prompt"], generation_prompt=True)
        answers = [chat.encode_answer(TOKENIZER, bound, row[side]) for side in ("chosen", "rejected")]
        expected = [(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)) for answer in answers]
        assert list(sides(document)) == expected


def test_the_shared_start_is_the_longest_one_that_leaves_something_of_each_side(make):
    for document in make(random_rows(40, seed=2)).documents:
        start, chosen, rejected = document.segments
        assert (chosen.ids_L[0], chosen.weights_L[0]) != (rejected.ids_L[0], rejected.weights_L[0])
        assert not start.weights_L[0], "the first token has no predecessor"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 9], [[5, 6], [7, 8], [9]]),
        ([5, 6, 7], [5, 6], [[5], [6, 7], [6]]),  # one side is the start of the other
        ([5, 6], [5, 6, 7, 8], [[5], [6], [6, 7, 8]]),
        ([5, 8], [5, 9], [[5], [8], [9]]),
    ],
)
def test_token_ids_are_divided_where_they_first_differ(make, chosen, rejected, expected):
    row = {"prompt_ids": chosen[:1], "chosen_ids": chosen[1:], "rejected_ids": rejected[1:]}
    (document,) = make([row]).documents
    assert [segment.ids_L.tolist() for segment in document.segments] == expected
    assert sides(document)[0] == (chosen, [0.0] + [1.0] * (len(chosen) - 1))
    assert sides(document)[1] == (rejected, [0.0] + [1.0] * (len(rejected) - 1))


def test_tokens_that_count_on_one_side_only_are_not_shared(make):
    chosen, rejected = turns("q", "a", "r", "b"), turns("q", "a", "r", "c")
    rejected[1]["train"] = False
    (document,) = make([whole(chosen, rejected)]).documents
    assert len(document.segments[0].ids_L) == START  # up to the first answer, whose tokens are the same
    assert sides(document) == (alone(chosen), alone([rejected[0], {**rejected[1], "weight": 0.0}, *rejected[2:]]))


def test_every_assistant_turn_is_scored_on_both_sides_or_only_the_last(make):
    row = whole(turns("q", "same", "r", "good"), turns("q", "same", "r", "bad"))
    for train, scored in (("all", [["same<|im_end|>", "good<|im_end|>"], ["same<|im_end|>", "bad<|im_end|>"]]),
                          ("last", [["good<|im_end|>"], ["bad<|im_end|>"]])):  # fmt: skip
        (document,) = make([row], train=train).documents
        assert [_scored(side) for side in sides(document)] == scored
    with pytest.raises(InputError, match=r"data\.train: is 'first'"):
        make([row], train="first")


def _scored(side: Side) -> list[str]:
    """The texts of the runs of scored tokens."""
    runs, before = [], 0.0
    for token, weight in zip(*side, strict=True):
        if weight:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = weight
    return [str(TOKENIZER.decode(run)) for run in runs]


# Sharing changes nothing ----------------------------------------------------------------------------------------------


def summed(data: PreferenceData) -> dict[int, tuple[float, float]]:
    """A number for each side of each row, from a made-up log-prob of every scored token: of its place and its id."""
    found = {}
    for batch in data.train_dataloader():
        for micro in batch.packs:
            places_N = micro.positions_T[micro.source_N]
            logp_N = -(1 + micro.target_N.double() % 7) / (1 + places_N.double())
            for row, *sums in zip(micro.rows, *pair_sum(logp_N, micro.segment_N, len(micro.rows)), strict=True):
                found[row] = tuple(map(float, sums))
    return found


def test_sums_over_scored_tokens_are_the_same_with_and_without_sharing(make):
    rows = random_rows(30, seed=3)
    shared, apart = make(rows), make(rows, share_prefix=False)
    assert all(len(document.segments[0].ids_L) == 1 for document in apart.documents)
    assert sum(shared.mixed.lengths) < 0.8 * sum(apart.mixed.lengths)
    one, other = summed(shared), summed(apart)
    assert sorted(one) == list(range(30))
    for row in one:
        assert one[row] == pytest.approx(other[row], rel=1e-12)


def test_neither_order_nor_neighbours_of_rows_change_a_pair(make):
    rows = random_rows(20, seed=4)
    documents = list(make(rows).documents)
    order = random.Random(0).sample(range(20), 14)  # six are dropped
    for row, document in zip(order, make([rows[row] for row in order]).documents, strict=True):
        for ours, theirs in zip(document.segments, documents[row].segments, strict=True):
            assert torch.equal(ours.ids_L, theirs.ids_L)
            assert torch.equal(ours.weights_L, theirs.weights_L)


# Left out -------------------------------------------------------------------------------------------------------------


def reasons(data: PreferenceData) -> dict[str, int]:
    return data.manifest()["sources"]["rows"]["left_out"]


def test_what_teaches_nothing_is_left_out_with_a_table_by_reason(make, caplog):
    silent = turns("q", "a")
    silent[1]["train"] = False
    rows = [
        pair("good", "bad"),
        pair("same", "same"),
        pair("", "bad"),
        {**pair("good", "bad"), "score_chosen": 4, "score_rejected": 4},
        pair("good", "bad", prompt=" "),
        whole(turns("q", "a"), silent),  # equal in words
        whole(turns("q", "b"), silent),
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []},
    ]
    data = make(rows)
    with caplog.at_level(logging.INFO):
        assert len(data.documents) == 1
    assert caplog.messages[0].endswith(
        "1 kept         8 left out  1 with a tie, 2 with an empty answer, 1 with an empty message, "
        "3 with equal answers, 1 without a scored token"
    )


def test_sides_that_differ_only_in_what_a_template_drops_are_equal(make, tiny, tmp_path):
    rows = [pair("good", "bad"), pair("good", "good \n")]
    folder = shutil.copytree(tiny, tmp_path / "llama3")
    llama3_bytes().save_pretrained(folder)
    assert len(make(rows).documents) == 2
    data = make(rows, tokenizer=str(folder), template="llama3")  # it strips what messages say
    assert len(data.documents) == 1
    assert reasons(data) == {"with equal answers": 1}


def test_when_every_pair_has_two_equal_answers_the_error_says_so(make):
    said = r"source 'rows': every row was left out \(3 with equal answers\)\. Give pairs whose two answers differ; look"
    with pytest.raises(InputError, match=said):
        make([pair("same", "same")] * 3).setup()
    with pytest.raises(InputError, match=r"\(2 with a tie\)\. Give pairs of which one answer was judged better"):
        make([{**pair("a", "b"), "score_chosen": 1, "score_rejected": 1}] * 2).setup()
    with pytest.raises(InputError, match=r"\(2 whose rejected answer has the higher score\)\. Swap the columns"):
        make([{**pair("a", "b"), "score_chosen": 1, "score_rejected": 2}] * 2).setup()


def test_a_bad_row_is_named_with_its_file(make):
    rows = [pair("good", "bad"), whole(turns("q", "a"), turns("r", "b"))]
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2: the prompts differ between the two sides: message 1"):
        make(rows).setup()


def test_columns_match_filters_and_counts_work_for_pairs(write):
    rows = [{"q": "q", "better": f"good {i}", "worse": "bad", "kind": "ab"[i % 2]} for i in range(20)]
    rows[0]["worse"] = "I am OpenAI's"
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    source = replace(write(rows), columns=columns, match={"kind": "a"}, filters=[Keywords(["OpenAI"])])
    data = PreferenceData(sources=[source], **SETTINGS)
    assert len(data.documents) == 9
    assert reasons(data) == {"with the word 'OpenAI'": 1}  # on either side
    for setting, count in (
        ({"count": 5}, 5),
        ({"cap": 100}, 9),
        ({"fraction": 0.5, "filters": []}, 5),
        ({"limit": 3}, 2),
    ):
        assert len(PreferenceData(sources=[replace(source, **setting)], **SETTINGS).documents) == count
    assert len(PreferenceData(sources=[replace(source, upsample=2.0)], **SETTINGS).documents) == 18


def test_keep_empty_keeps_empty_messages_and_never_an_empty_answer(write):
    rows = [pair("good", "bad", prompt=""), pair("", "bad")]
    data = PreferenceData(sources=[replace(write(rows), keep_empty=True)], **SETTINGS)
    assert len(data.documents) == 1
    assert reasons(data) == {"with an empty answer": 1}


def test_ids_of_another_vocabulary_are_refused_by_the_texts_beside_them(make, smol):
    """As `tulu pairs` writes rows: of each answer the ids and what they say. The demo's rows, read by another model."""

    def rows(tokenizer, *answers):
        end = tokenizer.eos_token_id
        ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in ("q", *answers)]
        return {
            **pair(*answers),
            **dict(
                zip(
                    ("prompt_ids", "chosen_ids", "rejected_ids"),
                    (ids[0], *([*one, end] for one in ids[1:])),
                    strict=True,
                )
            ),
        }

    own = [rows(TOKENIZER, "good", "bad"), rows(TOKENIZER, "right", "wrong")]
    assert len(make(own).documents) == 2
    other = [rows(load_tokenizer(smol), "good", "bad"), rows(load_tokenizer(smol), "right", "wrong")]
    said = r"^.*rows\.jsonl, row 1: chosen is 'good', and chosen_ids are '.*' by the tokenizer of .*remove prompt_ids"
    with pytest.raises(InputError, match=said):
        make(other).setup()
    with pytest.raises(InputError, match=said):
        make(own, tokenizer=smol, template="chatml").setup()
    assert len(make([{**own[0], "chosen": "edited"}, own[1]]).documents) == 2
    assert (
        len(make([{name: ids for name, ids in row.items() if name.endswith("_ids")} for row in other]).documents) == 2
    )


# Long pairs -----------------------------------------------------------------------------------------------------------


def test_the_limit_is_for_each_side_and_not_for_the_pack(make):
    row = pair("a" * 10, "b" * 4)  # 25 + 11 and 25 + 5
    data = make([row], max_tokens=36)
    assert data.mixed.lengths.tolist() == [41]
    with pytest.raises(InputError, match=r"every row was left out \(1 longer than 35 tokens\)"):
        make([row], max_tokens=35).setup()
    with pytest.raises(InputError, match=r"row 1: the row has 36 tokens, and max_tokens is 35"):
        make([row], max_tokens=35, on_overflow="error").setup()


def test_each_side_is_cut_on_its_own_and_keeps_its_end_token(make):
    data = make([pair("a" * 100, "b" * 4), pair("c", "d")], max_tokens=60, on_overflow="truncate")
    (chosen, weights), rejected = sides(data.documents[0])
    assert TOKENIZER.decode(chosen) == f"<|user|>\nq\n<|assistant|>\n{'a' * 34}<|im_end|>"
    assert weights == [0.0] * START + [1.0] * 35
    assert rejected == alone(turns("q", "bbbb"))
    assert data.manifest()["totals"]["truncated"] == 1
    assert sides(data.documents[1]) == (alone(turns("q", "c")), alone(turns("q", "d")))


def test_the_turns_of_a_cut_side_that_the_other_has_too_are_never_all_that_is_left(make):
    same = ("q", "same", "r")
    row = whole(turns(*same, "a" * 100), turns(*same, "b" * 100))
    data = make([row, pair("c", "d")], max_tokens=80, on_overflow="truncate")
    shared = alone(turns(*same, "a"))[0][:-2]
    for side, letter in zip(sides(data.documents[0]), "ab", strict=True):
        assert TOKENIZER.decode(side[0]) == TOKENIZER.decode(shared) + letter * (79 - len(shared)) + "<|im_end|>"
        assert sum(side[1]) == 5 + (80 - len(shared))  # "same" and its end token count on both sides


def test_whole_turns_of_its_own_are_dropped_first(make):
    row = whole(turns("q", "one", "r", "two" * 40), turns("q", "other"))
    data = make([row, pair("c", "d")], max_tokens=60, on_overflow="truncate")
    assert sides(data.documents[0]) == (alone(turns("q", "one")), alone(turns("q", "other")))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (pair("a" * 50, "b", prompt="q" * 50), "cut to nothing at 60 tokens"),
        (pair("x" * 40 + "a", "x" * 40 + "b"), "cut to nothing at 60 tokens"),  # what differs lies behind the limit
        ({"prompt_ids": [1] * 20, "chosen_ids": [2] * 40, "rejected_ids": [2] * 41}, "equal when cut at 60 tokens"),
        ({"prompt_ids": [1] * 70, "chosen_ids": [2], "rejected_ids": [3]}, "cut to nothing at 60 tokens"),
    ],
)
def test_pairs_of_which_the_cut_leaves_nothing_are_dropped_and_count_as_too_long(make, row, why):
    data = make([pair("c", "d"), row], max_tokens=60, on_overflow="truncate")
    assert len(data.documents) == 1
    assert reasons(data) == {why: 1}
    with pytest.raises(InputError, match=r"1 of 2 rows \(50%\) are too long"):
        make([pair("c", "d"), row], max_tokens=60, on_overflow="truncate", max_dropped_share=0.4).setup()


def test_an_answer_that_a_sampler_cut_is_cut_anywhere_and_one_with_an_end_keeps_it(make):
    row = {"prompt_ids": [1] * 20, "chosen_ids": [2] * 60, "rejected_ids": [*[3] * 60, END]}
    (document,) = make([row], max_tokens=60, on_overflow="truncate").documents
    assert sides(document)[0][0] == [1] * 20 + [2] * 40
    assert sides(document)[1][0] == [1] * 20 + [3] * 39 + [END]


def test_cutting_is_within_the_limit_and_keeps_both_sides_apart_for_any_limit():
    template = chat.chat_template("tulu", TOKENIZER)
    for row in random_rows(30, seed=5):
        both = chat.encode_many(TOKENIZER, template, [row["chosen"], row["rejected"]])
        chosen, rejected = map(pairs.without_tail, both)
        shared = pairs.common_start(chosen, rejected)
        for limit in range(20, max(len(chosen.ids), len(rejected.ids)) + 2, 7):
            for side in (chosen, rejected):
                cut = pairs.cut(side, shared, limit)
                first = next(at for at, weight in enumerate(side.weights) if weight and at >= shared)
                if cut is None:
                    assert first + 2 > limit  # no room for one scored token of its own and an end token
                    continue
                assert len(cut.ids) == len(cut.weights) <= limit
                assert cut.ids[-1] == END
                assert cut.ids[: first + 1] == side.ids[: first + 1]
                assert cut.weights[: first + 1] == side.weights[: first + 1]


def test_a_side_without_a_scored_token_is_nothing():
    assert pairs.without_tail(Encoded([1, 2], [0.0, 0.0], (2,))) == Encoded([], [], ())
    assert pairs.without_tail(Encoded([1, 2, 3], [0.0, 1.0, 0.0], (2, 3))) == Encoded([1, 2], [0.0, 1.0], (2,))


# Lengths, validation, the doctor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prefix", [True, False])
def test_lengths_of_both_sides_are_those_of_the_documents(write, share_prefix):
    sources = [replace(write(random_rows(12, seed=6), "one"), upsample=1.5), write(random_rows(9, seed=7), "two")]
    data = PreferenceData(sources=sources, share_prefix=share_prefix, **SETTINGS)
    found = pairs.side_lengths(data.documents)
    assert found.tokens.shape == found.scored.shape == (27, 2)
    for row, document in enumerate(data.documents):
        both = sides(document)
        assert found.tokens[row].tolist() == [len(ids) for ids, _ in both]
        assert found.scored[row].tolist() == [sum(weights) for _, weights in both]


def test_validation_pairs_come_once_each_and_are_not_trained(write):
    settings = {**SETTINGS, "micro_tokens": 300}
    held_out = write(random_rows(11, seed=8), "held out")
    data = PreferenceData(sources=[write(random_rows(9, seed=9))], validation=[held_out], **settings)
    plain = PreferenceData(sources=data.sources, **settings)
    batches = list(data.val_dataloader())
    assert sorted(row for batch in batches for micro in batch.packs for row in micro.rows) == list(range(11))
    assert [batch.denominator for batch in batches] == [4.0, 4.0, 3.0]
    assert data.digest() == plain.digest()
    training, validation = data.document_sets
    assert (len(training), len(validation)) == (9, 11)
    assert plain.document_sets == (plain.documents,)
    assert not hasattr(plain, "val_dataloader") or plain.val_dataloader.__func__ is not PreferenceData._val_dataloader
    packed = [row for micro in data.packs(range(11), 300, validation) for row in micro.rows]
    assert sorted(packed) == list(range(11))
    with pytest.raises(InputError, match=r"data\.validation: there is no source"):
        PreferenceData(sources=data.sources, validation=[], **settings)


def test_the_doctor_looks_at_chosen_conversations(make):
    data = make([*random_rows(60), {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    data.setup()
    assert "hold on 5 probes and 50 rows" in data.checkup
    only_ids = make([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    only_ids.setup()
    assert "hold on 5 probes (" in only_ids.checkup


def test_settings_that_decide_the_tokens_are_in_the_manifest_and_change_the_digest(make):
    rows = random_rows(5)
    made = [make(rows), make(rows, share_prefix=False), make(rows, train="last")]
    settings = [data.manifest()["settings"] for data in made]
    assert [(each["share_prefix"], each["train"]) for each in settings] == [
        (True, "all"), (False, "all"), (True, "last"),
    ]  # fmt: skip
    assert len({data.digest() for data in made}) == 3
