"""Decontamination by embeddings: equal to texts embedded and compared one by one, and what a real model finds."""

import json
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.data import similar as module
from tulu_lightning.data.decontaminate import rows_to_drop, verdicts
from tulu_lightning.data.decontaminate_report import as_text, report_of
from tulu_lightning.data.decontaminate_scan import evaluation_index, find, open_scan
from tulu_lightning.data.decontaminate_settings import Decontaminate, Evaluation
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.similar import similar
from tulu_lightning.data.sources import Source, open_source
from tulu_lightning.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*questions):
    return {
        "messages": [
            {"role": role, "content": text} for q in questions for role, text in (("user", q), ("assistant", "Yes."))
        ]
    }


def sets(tmp_path, *items):
    path = jsonl(tmp_path / "items.jsonl", [{"q": item} for item in items])
    return [Evaluation("set", path=path, fields=["q"])]


def one_by_one(model, tokenizer, text, longest):
    """A text's vector by transformers' own forward, alone, and a plain mean."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
    if not ids:
        return None
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0].tolist()
    return [sum(column) / len(hidden) for column in zip(*hidden, strict=True)]


def cosine(one, other):
    if one is None or other is None:
        return 0.0
    dot, a, b = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((one, other), (one, one), (other, other)))
    return dot / (a * b) ** 0.5


def test_blocked_products_give_what_texts_compared_one_by_one_give(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ITEMS", 3)
    monkeypatch.setattr(module, "TEXTS", 5)
    draw = random.Random(0)
    words = ["seven", "grey", "geese", "flew", "south", "in", "winter", "over", "the", "pond"]

    def some():
        return " ".join(draw.choice(words) for _ in range(draw.randrange(1, 30)))

    items = [some() for _ in range(8)]
    rows = [[], [""], [items[2]], *([some() for _ in range(draw.randrange(1, 4))] for _ in range(9))]
    loaded = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), AutoTokenizer.from_pretrained(tiny)
    vectors = {text: one_by_one(*loaded, text, 12) for text in {*items, *(turn for row in rows for turn in row)}}
    expected = {
        (row, item): max((cosine(vectors[turn], vectors[items[item]]) for turn in rows[row]), default=-1.0)
        for row in range(len(rows))
        for item in range(len(items))
    }
    values = sorted(expected.values())
    gap = max(range(len(values) // 3, len(values) - 9), key=lambda at: values[at + 1] - values[at])
    similarity = (values[gap] + values[gap + 1]) / 2  # no pair is near the threshold
    settings = Decontaminate(sets(tmp_path, *items), mode="embedding", model=tiny, similarity=similarity, max_tokens=12)
    found = similar(evaluation_index(settings), rows, settings)
    pairs = list(zip(found.rows_P.tolist(), found.items_P.tolist(), strict=True))
    assert pairs == sorted(pair for pair, value in expected.items() if value > similarity)
    assert 8 < len(pairs) < len(expected)
    np.testing.assert_allclose(found.shares_P, [expected[pair] for pair in pairs], atol=1e-5)
    assert found.shares_P[pairs.index((2, 2))] == pytest.approx(1.0)


def test_as_a_step_of_a_mixture_and_not_embedded_again(tiny, tmp_path, monkeypatch):
    secret = "How many geese came back?"
    rows = [chat(f"What is {number} and so on?") for number in range(5)] + [chat("Hello!", secret)]
    settings = Decontaminate(sets(tmp_path, secret), mode="embedding", model=tiny, similarity=0.999)
    source = Source("geese", path=jsonl(tmp_path / "rows.jsonl", rows), decontaminate=settings)
    shared = {"tokenizer": tiny, "max_tokens": 200, "examples_per_step": 1}
    assert SFTData(sources=[source], **shared).manifest()["totals"]["kept"] == 5
    monkeypatch.setattr(module, "_directions", lambda *_: pytest.fail("embedded again"))
    assert SFTData(sources=[source], **shared).manifest()["totals"]["kept"] == 5


def of_my_own(texts, model, max_tokens):
    """Letters counted: a stand-in for an embedding model of another kind."""
    assert model == "letters"
    return [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_an_embedder_of_ones_own(tmp_path):
    named = {"model": "letters", "embedder": f"{__name__}.of_my_own"}
    settings = Decontaminate(sets(tmp_path, "abba"), mode="embedding", similarity=0.9, **named)
    found = similar(evaluation_index(settings), [["baab"], ["xyz"], ["aab"]], settings)
    assert found.rows_P.tolist() == [0, 2]
    assert found.shares_P.tolist() == pytest.approx([1.0, 3 / 10**0.5])  # (2, 1) and (1, 1): 3 / (√5 · √2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "embedding", "similarity": 0.9}, r"decontaminate.model: is left out"),
        ({"mode": "embedding", "model": "x"}, r"decontaminate.similarity: is left out\. Give a cosine"),
        ({"mode": "embedding", "model": "x", "similarity": 1.0}, "decontaminate.similarity: is 1.0"),
        (
            {"mode": "embedding", "model": "x", "similarity": 0.9, "item_share": 0.2},
            "item_share: is 0.2, and mode embed",
        ),
        ({"similarity": 0.9}, "similarity: is 0.9, and mode ngram does not read it"),
        ({"mode": "exact", "model": "x"}, "model: is x, and mode exact does not read it"),
    ],
)
def test_settings_that_do_nothing_or_are_missing_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Decontaminate([Evaluation("set", path="x")], **settings)


def test_a_threshold_that_tells_nothing_apart_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    settings = Decontaminate(sets(tmp_path, "one", "two"), mode="embedding", model=tiny, similarity=-1.0)
    with pytest.raises(InputError, match=r"similarity: is -1, and 4 pairs of 2 rows .* are above it\. Raise it"):
        similar(evaluation_index(settings), [["a"], ["b"]], settings)


@pytest.mark.slow
def test_a_real_model_finds_questions_in_other_words(smol, tmp_path):
    """What 8-grams cannot see; and what it takes for the same although it is not: other numbers."""
    question = (
        "Anna buys 3 boxes with 12 eggs each and breaks 5 eggs on the way home. How many eggs does she have left?"
    )
    other_words = re.sub("buys", "purchases", question).replace("How many", "What number of").replace(" and ", " but ")
    rows = [chat(text) for text in (
        "A train goes at 60 miles an hour for 2 hours and 30 minutes. How far does it get?",
        other_words,
        "Tom has 4 bags of 15 marbles each. He gives 6 marbles to his sister. How many does he keep?",
        "Write a poem about the sea in winter.",
        question.replace("12", "10"),
    )]  # fmt: skip
    source = Source("rows", path=jsonl(tmp_path / "rows.jsonl", rows))
    settings = Decontaminate(sets(tmp_path, question), mode="embedding", model=smol, similarity=0.98)
    scan = open_scan(source, open_source(source), evaluation_index(settings), settings)
    findings = find(scan)
    assert findings is not None
    assert rows_to_drop(scan, findings).tolist() == [1, 4]
    (verdict,) = verdicts(scan, findings)
    assert (verdict.hit, verdict.rows) == (1, 2)
    assert "Anna" in as_text([report_of(scan, findings)])
