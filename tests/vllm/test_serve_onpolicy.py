"""A real vLLM server of the real SmolLM2 as generator and as judge: `tulu generate`, `tulu judge`, `tulu pairs`, each killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from tulu_lightning import cli
from tulu_lightning.core.binarise import mean_rating
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sources import Source
from tulu_lightning.recipes.making.asks import prompt_key
from tulu_lightning.recipes.making.store import read_rows
from tulu_lightning.rollout.server_process import start_server

PROMPTS = (
    "Name a colour.",
    "What is 2 + 2?",
    "Write one short sentence about rain.",
    "Say hello in French.",
    "Which is larger, a cat or an elephant?",
    "What do bees make?",
)
RESPONSES = 3
QUESTION = """Rate how good each text is as an answer, from 1 (bad) to 5 (good).

Instruction: {instruction}

{texts}Your answer must have this form and nothing else, with your own numbers:
Text 1: 4
Text 2: 2
Text 3: 5"""  # a model of 135 million weights repeats the example: it rates places, and each aspect has an order of its own
NAME = "smollm2"


@pytest.fixture(scope="module")
def url(smol):
    options = ("--served-model-name", NAME, "--max-num-seqs", "8")
    server = start_server(smol, max_model_len=2048, kv_cache_mb=384, options=options)
    yield f"{server.url}/v1"
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, url):
    """Configs of the three commands."""
    made = tmp_path_factory.mktemp("onpolicy")
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"name": NAME, "url": url, "concurrency": 2}
    configs = {
        "generate": {
            "output": str(made / "responses"),
            "sources": [{"name": "chat", "path": str(made / "prompts.jsonl")}],
            "models": [model],
            "draw": "each",
            "responses": RESPONSES,
            "decoding": {"max_new_tokens": 24},
        },
        "judge": {
            "input": str(made / "responses"),
            "output": str(made / "ratings"),
            "judges": [model],
            "aspects": ["helpfulness", "truthfulness"],
            "question": QUESTION,
            "system": "You rate texts.",
            "max_new_tokens": 40,
        },
        "pairs": {"output": str(made / "pairs"), "input": str(made / "responses"), "ratings": str(made / "ratings")},
    }
    for name, config in configs.items():
        (made / f"{name}.yaml").write_text(json.dumps(config))  # which is YAML
    return made


def lines(folder):
    return [line for path in sorted(folder.glob("rows-*")) for line in path.read_bytes().splitlines(keepends=True)]


def killed_and_again(folder, command, output, enough):
    """Run a command, kill it when so many rows are there, and run it to its end: what was there stays as it was."""
    config = ["--config", str(folder / f"{command}.yaml")]
    process = subprocess.Popen([sys.executable, "-m", "tulu_lightning", command, *config], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while len(lines(output)) < enough and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = [line for line in lines(output) if line.endswith(b"\n")]
    assert cli.main([command, *config]) == 0
    assert lines(output)[: len(before)] == before
    rows = list(read_rows(output))
    assert enough <= len(before) < len(rows), "it was killed midway"
    return rows, json.loads((output / "summary.json").read_text())


def test_responses_of_a_real_server(folder):
    rows, summary = killed_and_again(folder, "generate", folder / "responses", RESPONSES)
    assert len({row["key"] for row in rows}) == len(rows) == len(PROMPTS) * RESPONSES
    assert (summary["failed"], summary["prompts"], summary["responses"]) == (0, len(PROMPTS), len(rows))
    keys = {prompt_key([{"role": "user", "content": prompt}]): prompt for prompt in PROMPTS}
    assert Counter(row["prompt_key"] for row in rows) == dict.fromkeys(keys, RESPONSES)
    for row in rows:
        assert (row["model"], row["version"], row["source"], row["seed"]) == (NAME, NAME, "chat", 0)
        assert row["messages"][-1]["content"] == keys[row["prompt_key"]]
        assert 1 <= row["tokens"] <= 24 < row["prompt_tokens"]  # SmolLM2's template has a system message
        assert row["finish"] == "stop" or row["tokens"] == 24
    assert len({row["response"] for row in rows}) > len(PROMPTS), "each sample has a seed of its own"
    assert summary["tokens"] == sum(row["tokens"] for row in rows)


def test_the_same_server_as_judge(folder):
    rows, summary = killed_and_again(folder, "judge", folder / "ratings", 3)
    assert len({row["key"] for row in rows}) == len(rows) == 2 * len(PROMPTS)
    assert (summary["failed"], summary["incomplete"]) == (0, 0)
    for row in rows:
        assert len(row["responses"]) == len(row["ratings"]) == RESPONSES
        assert all(key.startswith(row["prompt_key"]) for key in row["responses"])
        assert all(rating is None or rating in (1, 2, 3, 4, 5) for rating in row["ratings"])
        assert row["tokens"] >= 1
    unread = Counter(row["aspect"] for row in rows for rating in row["ratings"] if rating is None)
    assert {each["aspect"]: each["unreadable"] for each in summary["ratings"]} == {
        name: unread[name] for name in ("helpfulness", "truthfulness")
    }
    read = 2 * len(PROMPTS) * RESPONSES - sum(unread.values())
    assert read >= len(PROMPTS), "a small judge misses the form now and then, not mostly"


def test_pairs_of_them_are_what_dpo_reads(folder, smol):
    ratings: dict[str, list] = {}
    for row in read_rows(folder / "ratings"):
        for key, rating in zip(row["responses"], row["ratings"], strict=True):
            ratings.setdefault(key, []).append(rating)
    means = {key: mean_rating(each) for key, each in ratings.items()}
    texts = {row["key"]: row["response"] for row in read_rows(folder / "responses")}
    assert cli.main(["pairs", "--config", str(folder / "pairs.yaml")]) == 0
    file = folder / "pairs" / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    summary = json.loads((folder / "pairs" / "summary.json").read_text())
    assert 1 <= len(rows) == summary["pairs"] == len(PROMPTS) - sum(summary["without"].values())
    for row in rows:
        own = {key: mean for key, mean in means.items() if key.startswith(row["id"]) and mean is not None}
        assert row["chosen_rating"] == max(own.values()) > row["rejected_rating"]
        assert row["chosen"] in [texts[key] for key, mean in own.items() if mean == row["chosen_rating"]]
        assert row["rejected"] in [texts[key] for key, mean in own.items() if mean == row["rejected_rating"]]
    data = PreferenceData(
        sources=[Source("own", path=str(file))], tokenizer=smol, template="smollm2", max_tokens=256, examples_per_step=1
    )
    data.setup()
    assert len(data.documents) == len(rows)
