"""The manifest of a mixture: every number worked out by hand, hashes that say what they say."""

import json
from dataclasses import replace

import pytest

from tulu_lightning.data.manifest import manifest_table
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData

SETTINGS = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 60, "examples_per_step": 4}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def data(write):
    """Two sources, one twice; a byte is a token, and a row is 24 + question + answer + 1 tokens."""
    first = write([chat("q", "abc"), chat("qq", "d"), chat("q", "e" * 99), chat("q", " ")], "first")
    return SFTData(sources=[replace(first, upsample=2.0), write([chat("q", "xy")], "second")], seed=3, **SETTINGS)


def test_every_number_of_a_manifest(data):
    manifest = data.manifest()
    first, second = manifest["sources"]["first"], manifest["sources"]["second"]
    digests = {name: source.pop("digest") for name, source in manifest["sources"].items()}
    prints = {name: source.pop("fingerprint") for name, source in manifest["sources"].items()}
    assert first == {
        "rows": 4,
        "tried": 4,
        "kept": 2,
        "left_out": {"longer than 60 tokens": 1, "with an empty message": 1},
        "truncated": 0,
        "repeated": 2,
        "used": 4,
        "tokens": 2 * ((24 + 1 + 3 + 1) + (24 + 2 + 1 + 1)),
        "trained_tokens": 2 * ((3 + 1) + (1 + 1)),
    }
    assert (second["rows"], second["used"], second["tokens"], second["trained_tokens"]) == (1, 1, 28, 3)
    assert manifest["totals"] == {
        **{"rows": 5, "tried": 5, "kept": 3, "left_out": 2, "truncated": 0, "repeated": 2, "used": 5},
        **{"tokens": 114 + 28, "trained_tokens": 12 + 3},
    }
    assert len({*digests.values(), *prints.values(), manifest["digest"]}) == 5
    settings = manifest["settings"]
    assert settings.pop("tokenizer_digest") == data.tokenizer_digest
    assert settings == {
        **{"seed": 3, "template": "tulu", "tokenizer": "tiny-random-llama"},
        **{"max_tokens": 60, "on_overflow": "drop", "train": "all"},
    }
    assert data.token_counts() == {"first": (4, 114, 12), "second": (1, 28, 3)}


def test_a_manifest_is_plain_and_the_same_every_time(data, write):
    text = json.dumps(data.manifest())
    assert json.loads(text) == data.manifest()
    again = SFTData(sources=data.sources, seed=3, **SETTINGS)
    assert json.dumps(again.manifest()) == text


def test_the_content_hash_changes_with_a_row_and_with_a_repeat(data, write):
    digest = data.manifest()["digest"]
    first, second = data.sources
    assert digest == data.digest()
    for sources in (
        [first],
        [second, first],
        [replace(first, upsample=1.0), second],
        [replace(first, limit=1), second],
    ):
        assert SFTData(sources=sources, seed=3, **SETTINGS).manifest()["digest"] != digest


def test_the_content_hash_knows_which_rows_are_repeated(write):
    """By half of four rows: which two are used once more is the seed's to say."""
    source = replace(write([chat("q", answer) for answer in "abcd"]), upsample=1.5)
    made = {}
    for seed in range(8):
        data = SFTData(sources=[source], seed=seed, **SETTINGS)
        made[tuple(sorted(data.mixed.places.tolist()))] = data.digest()
    assert len(made) > 1
    assert all(len(places) == 6 for places in made)
    assert len(set(made.values())) == len(made)


def test_a_table_has_a_line_a_source_and_says_why_rows_are_left_out(data):
    lines = manifest_table(data.manifest()).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["first", "4", "4", "2", "2", "0", "2", "4", "114", "12"],
        ["second", "1", "1", "1", "0", "0", "0", "1", "28", "3"],
        ["all", "5", "5", "3", "2", "0", "2", "5", "142", "15"],
    ]
    assert lines[0].split("  ")[0] == "source"
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4] == "first: left out 1 longer than 60 tokens, 1 with an empty message"
    assert lines[5].startswith(f"content {data.digest()[:16]}, seed 3, template tulu, ")


def test_pairs_and_prompts_have_one_too(write):
    pairs = PreferenceData(sources=[write([{"prompt": "q", "chosen": "good", "rejected": "no"}])], **SETTINGS)
    assert pairs.manifest()["totals"]["tokens"] == 25 + 5 + 3
    assert pairs.manifest()["totals"]["trained_tokens"] == 5 + 3
    prompt = {**chat("q", "a"), "ground_truth": "1", "verifier": "last_number"}
    prompt["messages"] = prompt["messages"][:1]
    prompts = PromptData(sources=[write([prompt])], **SETTINGS)
    assert prompts.manifest()["totals"]["tokens"] == 25
    assert prompts.manifest()["totals"]["trained_tokens"] == 0
