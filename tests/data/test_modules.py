"""The three data modules: what is in a step and what is refused (left-out rows: `test_left_out.py`)."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData, PromptSource
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Check

TOKENIZER = byte_tokenizer()
SETTINGS = {"tokenizer": "tiny-random-llama", "max_tokens": 200, "examples_per_step": 4}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt(question: str, target: str = "1") -> dict:
    return {"messages": [{"role": "user", "content": question}], "ground_truth": target, "verifier": "last_number"}


ROWS = {
    SFTData: [chat("q" * (1 + i % 5), "a" * (1 + 3 * i % 7)) for i in range(10)],
    PreferenceData: [pair("q" * (1 + i % 5), "good" * (1 + i % 3), "b" * (1 + i % 4)) for i in range(10)],
    PromptData: [prompt("q" * (1 + i % 5), str(i)) for i in range(10)],
}
EVERY = pytest.mark.parametrize("module", [SFTData, PreferenceData, PromptData])
PACKED = pytest.mark.parametrize("module", [SFTData, PreferenceData])


@pytest.fixture
def make(write):
    """A data module over rows of its own kind, with any setting changed."""

    def make(module, rows=None, **settings):
        return module(sources=[write(rows or ROWS[module])], **{**SETTINGS, **settings})

    return make


def on_rank(data, rank: int, world_size: int, replaces_sampler: bool = False):
    connector = SimpleNamespace(use_distributed_sampler=replaces_sampler, is_distributed=world_size > 1)
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        _accelerator_connector=connector,
    )
    return data


# Steps ----------------------------------------------------------------------------------------------------------


@PACKED
def test_the_rows_of_a_step_are_the_same_for_any_number_of_ranks_and_any_micro_batch(make, module):
    alone = [(batch.rows, batch.denominator) for batch in make(module).train_dataloader()]
    assert len(alone) == 3  # ceil(10 / 4)
    assert sorted(row for rows, _ in alone for row in rows) == list(range(10))
    for world_size in (1, 2, 4):
        for micro_tokens in (1, 60, 4096):
            ranks = [
                list(on_rank(make(module, micro_tokens=micro_tokens), rank, world_size).train_dataloader())
                for rank in range(world_size)
            ]
            for step, batches in enumerate(zip(*ranks, strict=True)):
                assert {(batch.rows, batch.denominator) for batch in batches} == {alone[step]}
                assert {batch.step for batch in batches} == {step}
                assert len({len(batch.packs) for batch in batches}) == 1  # collectives need as many on every rank
                dealt = [row for batch in batches for pack in batch.packs for row in pack.rows]
                assert sorted(dealt) == sorted(alone[step][0])


def test_a_rank_that_is_short_of_a_micro_batch_gets_a_filler_that_counts_for_nothing(make):
    data = make(SFTData, examples_per_step=1)
    ranks = [next(iter(on_rank(data, rank, 2).train_dataloader())) for rank in range(2)]
    (real,), (filler,) = sorted((batch.packs for batch in ranks), key=lambda packs: not packs[0].rows)
    assert real.rows == ranks[0].rows
    assert filler.rows == ()
    assert filler.weight_N.numel() > 0
    assert not filler.weight_N.any()


@PACKED
def test_padded_packs_have_few_shapes_and_the_same_content(make, module):
    whole = list(make(module, micro_tokens=128).train_dataloader())
    for world_size in (1, 3):
        ranks = [
            list(on_rank(make(module, micro_tokens=128, pad_to=64), rank, world_size).train_dataloader())
            for rank in range(world_size)
        ]
        for plain, *batches in zip(whole, *ranks, strict=True):
            packs = [pack for batch in batches for pack in batch.packs]
            assert {(batch.rows, batch.denominator) for batch in batches} == {(plain.rows, plain.denominator)}
            assert {pack.tokens_T.numel() for pack in packs} <= {64, 128}
            assert any(pack.padding for pack in packs)
            assert all(
                (pack.tokens_T[len(pack.tokens_T) - pack.padding :] == TOKENIZER.pad_token_id).all() for pack in packs
            )
            assert sorted(row for pack in packs for row in pack.rows) == sorted(plain.rows)
            sums = [sum(float(pack.weight_N.sum()) for pack in some) for some in (packs, plain.packs)]
            assert sums[0] == sums[1]


@pytest.mark.parametrize("pad_to", [-64, 48, 8192])
def test_packs_cannot_be_padded_to_what_does_not_divide_them(pad_to):
    with pytest.raises(InputError, match=rf"data.pad_to: is {pad_to}.*divisor of micro_tokens, which is 4096"):
        SFTData(sources=[Source("x", path="none")], pad_to=pad_to, **SETTINGS)


def test_an_sft_steps_denominator_is_its_number_of_trained_tokens(make):
    rows = [chat("q", "abc"), chat("q", "d")]  # each answer and its end token: 4 + 2
    (batch,) = make(SFTData, rows).train_dataloader()
    assert batch.denominator == 6.0
    assert sum(float(pack.weight_N.sum()) for pack in batch.packs) == 6.0


def test_a_preference_steps_denominator_is_its_number_of_pairs(make):
    assert [batch.denominator for batch in make(PreferenceData).train_dataloader()] == [4.0, 4.0, 2.0]


@EVERY
def test_the_run_is_as_long_as_epochs_or_max_steps_say(make, module):
    assert make(module).total_steps == 3
    assert make(module, epochs=2).total_steps == 6
    assert make(module, max_steps=2).total_steps == len(make(module, max_steps=2).train_dataloader()) == 2


@EVERY
def test_steps_are_a_function_of_the_seed(make, module):
    def rows(seed):
        return [
            batch.rows if hasattr(batch, "rows") else tuple(prompt.row for prompt in batch.prompts)
            for batch in make(module, seed=seed).train_dataloader()
        ]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


@EVERY
def test_a_run_resumes_at_every_step(make, module):
    whole = [repr(batch) for batch in make(module, epochs=2).train_dataloader()]
    for done in range(len(whole)):
        loader = make(module, epochs=2).train_dataloader()
        loader.load_state_dict({"step": done})
        assert [repr(batch) for batch in loader] == whole[done:]


@EVERY
def test_lightnings_own_sampler_is_refused_on_several_ranks(make, module):
    with pytest.raises(InputError, match=r"use_distributed_sampler: is true.*Set it to false"):
        on_rank(make(module), 0, 2, replaces_sampler=True).train_dataloader()
    assert len(on_rank(make(module), 0, 1, replaces_sampler=True).train_dataloader()) == 3


# Documents ------------------------------------------------------------------------------------------------------


def test_an_sft_document_is_one_segment_that_trains_the_answer(make):
    (document,) = make(SFTData, [chat("q", "ab")]).documents
    (segment,) = document.segments
    assert TOKENIZER.decode(segment.ids_L) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n"
    # 1 + 6 + 1 + 1 tokens of the user's turn, 1 + 10 of the opening, then a, b, end; the newline after is not trained.
    assert segment.weights_L.tolist() == [0.0] * 20 + [1.0] * 3 + [0.0]
    assert segment.parent == -1


def test_a_preference_document_is_the_prompt_then_chosen_then_rejected(make):
    (document,) = make(PreferenceData, [pair("q", "good", "no")], template="tulu").documents
    texts = [TOKENIZER.decode(segment.ids_L) for segment in document.segments]
    assert texts == ["<|user|>\nq\n<|assistant|>\n", "good<|im_end|>", "no<|im_end|>"]
    assert [segment.parent for segment in document.segments] == [-1, 0, 0]
    assert [segment.weights_L.tolist() for segment in document.segments] == [[0.0] * 25, [1.0] * 5, [1.0] * 3]


def test_token_ids_of_a_preference_row_go_in_unchanged(make):
    # The chosen answer was cut by the sampler: it has no end token, and none is added.
    row = {"prompt_ids": [257, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 258]}
    (document,) = make(PreferenceData, [row]).documents
    assert [segment.ids_L.tolist() for segment in document.segments] == [[257, 5, 6], [7, 8], [9, 258]]


def test_prompts_end_where_the_answer_begins_and_know_their_row(make):
    data = make(PromptData, [prompt("long" * 99), prompt("What is 1 + 1?", "2")])
    (only,) = data.prompts
    assert TOKENIZER.decode(only.ids).endswith("What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert only[1:] == ((Check("last_number", "2"),), "What is 1 + 1?", 0, "rows")
    assert data.stop_ids == (258,)
    (batch,) = data.train_dataloader()
    assert batch.prompts == (only,)


def test_generation_stops_on_what_the_tokenizers_folder_names_too(make, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 9]}')
    for module in (SFTData, PreferenceData, PromptData):
        assert make(module, tokenizer=str(folder)).stop_ids == (9, 258)
    start = tmp_path / "start"  # the policy's own folder may name others
    shutil.copytree(tiny, start)
    (start / "generation_config.json").write_text('{"eos_token_id": 7}')
    stage: Any = SimpleNamespace(
        trainer=SimpleNamespace(datamodule=make(SFTData, tokenizer=str(folder))), folder=str(start)
    )
    stage.trainer.datamodule.setup()
    assert Stage.stop_ids(stage) == (7, 9, 258)


def test_an_answers_weight_is_that_of_its_tokens(make):
    row = chat("q", "ab")
    row["messages"] += chat("r", "c")["messages"] + chat("s", "d")["messages"]
    row["messages"][1]["weight"], row["messages"][3]["train"] = 0.5, False
    data = make(SFTData, [row])
    ((segment,),) = data.documents[0]
    assert [weight for weight in segment.weights_L.tolist() if weight] == [0.5, 0.5, 0.5, 1.0, 1.0]
    (batch,) = data.train_dataloader()
    assert batch.denominator == 3.5


def test_a_row_with_nothing_to_train_is_left_out(make):
    row = chat("q", "a")
    row["messages"][1]["train"] = False
    assert len(make(SFTData, [chat("q", "a"), row]).documents) == 1
    with pytest.raises(InputError, match=r"every row was left out \(1 without a trained token\)"):
        make(SFTData, [row]).setup()


def test_packs_cover_the_given_rows_once_within_the_limit(make):
    data = make(PreferenceData)
    packs = list(data.packs(range(1, 9), micro_tokens=120))
    assert sorted(row for pack in packs for row in pack.rows) == list(range(1, 9))
    assert len(packs) > 1
    assert all(pack.tokens_T.numel() <= 120 for pack in packs)
    assert [len(pack.rows) for pack in data.packs([3, 4], micro_tokens=1)] == [1, 1]


def test_counts_and_names_go_by_source(write):
    sources = [write([chat("q", "abc"), chat("q", "d")], "first"), write([chat("qq", "e")], "second")]
    data = SFTData(sources=sources, **{**SETTINGS, "template": "tulu"})
    # "<|user|>\n" 9, question, newline, "<|assistant|>\n" 14, answer, end
    assert data.token_counts() == {"first": (2, (25 + 4) + (25 + 2), 4 + 2), "second": (1, 26 + 2, 2)}
    assert [data.source_of(row) for row in range(3)] == ["first", "first", "second"]


def test_setup_reads_once(make):
    data = make(SFTData)
    data.setup("fit")
    first = data.documents
    data.setup("validate")
    assert data.documents is first


# Bad input ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("name", ["max_tokens", "examples_per_step", "epochs", "max_steps"])
def test_a_count_below_one_is_refused_at_once(make, module, name):
    with pytest.raises(InputError, match=f"data.{name}: is 0. Use at least 1"):
        make(module, **{name: 0})


@PACKED
def test_micro_tokens_below_one_are_refused_at_once(make, module):
    with pytest.raises(InputError, match=r"data\.micro_tokens: is 0"):
        make(module, micro_tokens=0)


def test_prompts_know_no_micro_tokens(make):
    with pytest.raises(TypeError, match="micro_tokens"):
        make(PromptData, micro_tokens=64)


def test_an_unknown_overflow_rule_is_refused_at_once(make):
    with pytest.raises(InputError, match=r"data\.on_overflow: is 'cut'"):
        make(SFTData, on_overflow="cut")
    with pytest.raises(InputError, match=r"on_overflow: is 'truncate', and a row of PromptData cannot be cut"):
        make(PromptData, on_overflow="truncate")  # its last token is the one that matters


def test_no_source_and_two_of_one_name_are_refused(write):
    with pytest.raises(InputError, match="there is no source"):
        SFTData(sources=[], **SETTINGS).setup()
    with pytest.raises(InputError, match="two sources are called 'rows'"):
        SFTData(sources=[write(ROWS[SFTData])] * 2, **SETTINGS).setup()


@EVERY
def test_setup_names_the_first_bad_row_and_keeps_nothing(make, module):
    data = make(module, [*ROWS[module], {"wrong": 1}])
    for _ in range(2):  # a second try finds the same, not half of the rows
        with pytest.raises(InputError, match=r"rows\.jsonl, row 11: the row has no field"):
            data.setup()


def test_a_target_that_is_no_number_is_refused(make):
    with pytest.raises(
        InputError, match=r"row 1: verifier 'last_number' cannot use ground_truth: 'six' is not a number"
    ):
        make(PromptData, [prompt("q", "six")]).setup()


@EVERY
def test_an_unknown_template_or_tokenizer_is_refused(make, module):
    with pytest.raises(InputError, match="there is no chat template 'chatm'"):
        make(module, template="chatm").setup()
    with pytest.raises(InputError, match="tiny-random-lama"):
        make(module, tokenizer="tiny-random-lama").setup()


# Command line ---------------------------------------------------------------------------------------------------


@EVERY
def test_a_config_builds_the_module(module, write):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(module, "data")
    source = write(ROWS[module])
    config = {
        "class_path": f"{module.__module__}.{module.__name__}",
        "init_args": {"sources": [{"name": source.name, "path": source.path, "limit": 8}], **SETTINGS},
    }
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    data = instantiate(parser.parse_object({"data": config})).data
    kind = PromptSource if module is PromptData else Source
    assert data.sources == [kind(source.name, path=source.path, limit=8)]
    assert data.total_steps == 2
