"""Rows through the store give the packs that rows in memory gave."""

import random
from itertools import takewhile

import pytest
import torch

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.core import packing
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.types import Document, Segment

SETTINGS = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 120, "examples_per_step": 7}


def text(rng: random.Random) -> str:
    return "".join(rng.choice("abc é\n日") for _ in range(rng.randrange(1, 30)))


def chat_row(rng: random.Random) -> dict:
    turns = rng.choice([1, 1, 2, 3])
    roles = [role for _ in range(turns) for role in ("user", "assistant")]
    return {"messages": [{"role": role, "content": text(rng) + "."} for role in roles]}


def pair_row(rng: random.Random) -> dict:
    return {"prompt": text(rng) + "?", "chosen": text(rng) + "!", "rejected": text(rng) + "."}


def segment(ids, weights, parent=-1) -> Segment:
    return Segment(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32), parent)


def in_memory(module, rows: list[dict]) -> list[Document]:
    """Row by row with the plain encoder, as lists; the long way round."""
    tokenizer = byte_tokenizer()
    template = chat.chat_template("tulu", tokenizer)
    documents = []
    for row in rows:
        if module is SFTData:
            ids, trained = chat.encode(tokenizer, template, row["messages"])
            document, tokens = Document((segment(ids, [float(each) for each in trained]),)), len(ids)
        else:
            question = [{"role": "user", "content": row["prompt"]}]
            prompt, _ = chat.encode(tokenizer, template, question, generation_prompt=True)
            answers = [chat.encode_answer(tokenizer, template, row[side]) for side in ("chosen", "rejected")]
            same = len(
                list(takewhile(lambda ids: ids[0] == ids[1], zip(*answers, strict=False)))
            )  # none is the start of the other: both end in an end token
            start = segment(prompt + answers[0][:same], [0.0] * len(prompt) + [1.0] * same)
            rests = (segment(answer[same:], [1.0] * (len(answer) - same), 0) for answer in answers)
            document, tokens = Document((start, *rests)), len(prompt) + max(map(len, answers))
        if tokens <= SETTINGS["max_tokens"]:
            documents.append(document)
    return documents


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("module", "make"), [(SFTData, chat_row), (PreferenceData, pair_row)])
def test_the_packs_of_every_step_equal_those_of_documents_in_memory(module, make, ranks, write):
    rng = random.Random(len(module.__name__))
    rows = [make(rng) for _ in range(60)]
    documents = in_memory(module, rows)
    assert 20 < len(documents) < 60 or module is PreferenceData  # some were too long
    sources = [write(rows[:23], "one"), write(rows[23:], "two")]
    data = module(sources=sources, micro_tokens=250, seed=4, max_dropped_share=1.0, **SETTINGS)
    lengths = [packing.length(document) for document in documents]
    plan = StepPlan(lengths, 7, micro_tokens=250, seed=4, world_size=ranks)
    assert data.mixed.lengths.tolist() == lengths
    for step in range(plan.total_steps):
        for rank in range(ranks):
            batch = data._step_batch(data._plan(ranks), step, rank)
            assert batch.rows == plan.examples(step)
            wanted = [tuple(micro) for micro in plan.micro_batches(step, rank)]
            assert [pack.rows for pack in batch.packs] == wanted
            for pack in batch.packs:
                if pack.rows:
                    theirs = packing.pack([documents[row] for row in pack.rows], pack.rows)
                    assert all(
                        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                        for a, b in zip(pack, theirs, strict=True)
                    )
            total = sum(packing.loss_weight(documents[row]) for row in batch.rows)
            assert batch.denominator == (total if module is SFTData else len(batch.rows))


def test_packs_out_of_order_are_of_documents_in_memory_too(write):
    rng = random.Random(0)
    rows = [chat_row(rng) for _ in range(30)]
    documents = in_memory(SFTData, rows)
    data = SFTData(sources=[write(rows)], max_dropped_share=1.0, **SETTINGS)
    chosen = list(range(len(documents)))[::2]
    packs = list(data.packs(chosen, 300))
    order = [row for pack in packs for row in pack.rows]
    assert order == sorted(chosen, key=lambda row: (-packing.length(documents[row]), row))
    for pack in packs:
        assert torch.equal(pack.tokens_T, packing.pack([documents[row] for row in pack.rows]).tokens_T)
