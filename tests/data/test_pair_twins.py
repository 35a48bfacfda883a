"""Pairs beside those of transformers and of TRL's DPOTrainer, on the cases where these are right."""

import pytest
from chat_tokenizers import smollm2, turns
from test_mask_twins import CHATML, TULU, theirs

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.assets.rows import preference_rows
from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.errors import InputError

SETTINGS = {"max_tokens": 4096, "examples_per_step": 2}
TINY, SMOL = ("tiny-random-llama", byte_tokenizer), ("smollm2-135m-instruct", smollm2)

WHOLE = [
    {"chosen": turns("Hi", "Hello."), "rejected": turns("Hi", "Hell no.")},
    {
        "chosen": turns("What is 23 + 45?\n", "68", "And  12+3 ?", "15!\n\nDone", system="Be brief."),
        "rejected": turns("What is 23 + 45?\n", "68", "And 12-3 ?", "9", "x", "y", system="Be brief."),
    },
    {"chosen": turns("Grüße, 世界 🚀", "世界"), "rejected": turns("Grüße, 世界 🚀", "世 🚀", "?", "!")},
]
PARTS = [
    {"prompt": turns("Hi"), "chosen": turns("", "Hello.")[1:], "rejected": turns("", "Hell no.")[1:]},
    {"prompt": turns("q", "a", "r", system="s"), "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]},
]


def sides(data: PreferenceData) -> list[list[tuple[list[int], list[float]]]]:
    """Ids and weights of chosen and rejected, whole, for every row."""
    found = []
    for document in data.documents:
        start, *rests = ((segment.ids_L.tolist(), segment.weights_L.tolist()) for segment in document.segments)
        found.append([(start[0] + ids, start[1] + weights) for ids, weights in rests])
    return found


@pytest.mark.parametrize(("model", "make"), [TINY, SMOL])
@pytest.mark.parametrize(("template", "jinja"), [("tulu", TULU), ("chatml", CHATML)])
def test_both_sides_are_those_of_transformers_with_spans(model, make, template, jinja, write):
    tokenizer = make()
    data = PreferenceData(sources=[write(WHOLE)], tokenizer=model, template=template, **SETTINGS)
    for row, both in zip(WHOLE, sides(data), strict=True):
        for side, (ids, weights) in zip(("chosen", "rejected"), both, strict=True):
            their_ids, their_mask = theirs(tokenizer, jinja, row[side])
            # ChatML writes a newline after the last end token, which is context and plays no part.
            assert (ids, weights) == (their_ids[: len(ids)], their_mask[: len(ids)])
            assert tokenizer.decode(their_ids[len(ids) :]) == ("\n" if template == "chatml" else "")


@pytest.fixture(scope="module")
def trl_pairs(tmp_path_factory):
    """What DPOTrainer makes of rows: prompt, chosen and rejected ids."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    def prepare(tokenizer, rows):
        trainer = trl.DPOTrainer(
            model=str(resolve_model("tiny-random-llama")),
            processing_class=tokenizer,
            args=trl.DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False,
                disable_tqdm=True, max_length=None,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
        )  # fmt: skip
        return [tuple(row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")) for row in trainer.train_dataset]

    return prepare


def as_trl(prompt, chosen, rejected) -> list[tuple[list[int], list[float]]]:
    """The sides that TRL's collator makes: the prompt is context, all of an answer is scored."""
    return [(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)) for answer in (chosen, rejected)]


def test_trl_prepares_the_same_ids_and_masks_from_prompts_and_answers(trl_pairs, write):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TULU
    data = PreferenceData(sources=[write(PARTS)], tokenizer="tiny-random-llama", template="tulu", **SETTINGS)
    assert sides(data) == [as_trl(*ids) for ids in trl_pairs(tokenizer, PARTS)]


def test_trl_takes_prompt_and_answers_out_of_whole_conversations_and_scores_what_differs(trl_pairs, write):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TULU
    same = turns("q", "a", "r")
    rows = [{"chosen": [*same, *turns("", "good")[1:]], "rejected": [*same, *turns("", "bad")[1:]]}]
    source = write(rows)
    whole = PreferenceData(sources=[source], tokenizer="tiny-random-llama", template="tulu", **SETTINGS)
    last = PreferenceData(sources=[source], tokenizer="tiny-random-llama", template="tulu", train="last", **SETTINGS)
    found = [as_trl(*ids) for ids in trl_pairs(tokenizer, rows)]
    assert sides(last) == found
    assert [ids for ids, _ in sides(whole)[0]] == [ids for ids, _ in found[0]]
    assert [sum(weights) for _, weights in sides(whole)[0]] == [sum(weights) + 2 for _, weights in found[0]]  # "a", end


def test_trl_prepares_the_same_real_pairs(trl_pairs, write):
    try:
        rows = preference_rows(20)
    except InputError as error:
        pytest.skip(str(error))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TULU
    data = PreferenceData(
        sources=[write(rows)], tokenizer="tiny-random-llama", template="tulu", max_tokens=100_000, examples_per_step=2
    )
    assert sides(data) == [as_trl(*ids) for ids in trl_pairs(tokenizer, rows)]
