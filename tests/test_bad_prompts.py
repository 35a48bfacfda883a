"""Prompts that cannot be trained on are refused in one line with status 2, before any weights load."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tulu_lightning import cli
from tulu_lightning.models.backbone import PackedLM

CONFIGS = Path(__file__).parents[1] / "configs"
VERIFIER = "tulu_lightning.verifiers.last_number.LastNumber"


def prompt(i=0, **more):
    row = {"messages": [{"role": "user", "content": f"What is {i} + 1?"}], "ground_truth": str(i + 1)}
    return {**row, "verifier": "last_number", **more}


def without(*names, **more):
    return {name: value for name, value in prompt(**more).items() if name not in names}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(rows, source settings, data settings)` starts the tiny PPO stage on them and returns its complaint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PackedLM, "__init__", lambda *args, **kwargs: pytest.fail("weights were loaded"))

    def run(rows, source=None, model=None, stage="ppo", **data):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = [{"name": "mine", "path": "rows.jsonl", **(source or {})}]
        settings = {
            "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
            "data": {"init_args": {"sources": sources, **data}},
            **({"model": {"init_args": model}} if model else {}),
        }
        Path("mine.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        assert cli.main(["fit", "--config", "mine.yaml"]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tulu: error: ")]
        assert len(said) == 1, said
        return said[0].removeprefix("tulu: error: ")

    return run


GOOD = [prompt(i) for i in range(8)]
CHECK = {"verifier": "last_number", "ground_truth": "1"}


@pytest.mark.parametrize(
    ("row", "source", "said"),
    [
        (
            without("ground_truth"),
            {},
            "rows.jsonl, row 9: the row has no field 'ground_truth' (it has messages, verifier). Add 'ground_truth'.",
        ),
        (
            prompt(ground_truth="fifty-nine"),
            {},
            "rows.jsonl, row 9: verifier 'last_number' cannot use ground_truth: 'fifty-nine' is not a number. Correct",
        ),
        (
            prompt(verifier="last_numbr"),
            {},
            "rows.jsonl, row 9: there is no verifier 'last_numbr'. Did you mean 'last_number'?",
        ),
        (
            without("verifier", dataset="gsm8"),
            {},
            "rows.jsonl, row 9: no route leads from the dataset 'gsm8' to a verifier. Did you mean 'gsm8k'? Or add it",
        ),
        (
            without("verifier"),
            {},
            "rows.jsonl, row 9: the row has no field 'verifier' (it has messages, ground_truth). Add 'verifier' or",
        ),
        (
            without("verifier", checks=[CHECK, {**CHECK, "weight": 0}]),
            {},
            "rows.jsonl, row 9: weight of checks[1] is 0. Use a number above 0.",
        ),
        (
            without("verifier", checks=[CHECK, {**CHECK, "ground_truth": "six"}]),
            {},
            "rows.jsonl, row 9, checks[1]: verifier 'last_number' cannot use ground_truth: 'six' is not a number.",
        ),
        (
            prompt(),
            {"pass_rate": {"max": 0.9}},
            "rows.jsonl, row 1: the row has no field 'pass_rate' (it has messages, ground_truth, verifier). Add",
        ),
    ],
)
def test_a_row_that_cannot_be_judged(refused, row, source, said):
    assert refused([*GOOD, row], source).startswith(said)


@pytest.mark.parametrize(
    ("source", "data", "said"),
    [
        (
            {"verifier": "last_numbr"},
            {},
            "source 'mine': there is no verifier 'last_numbr'. Did you mean 'last_number'?",
        ),
        ({"dataset": "MTAH"}, {}, "source 'mine': no route leads from the dataset 'MTAH' to a verifier."),
        (
            {},
            {"routes": {"sums": "lst_number"}},
            "data.routes.sums: there is no verifier 'lst_number'. Did you mean 'last",
        ),
        ({"pass_rate": {"min": 0.9, "max": 0.1}}, {}, "pass_rate: min is 0.9 and max is 0.1. They are shares"),
        (
            {"pass_rate": {"mn": 0.9}},
            {},
            "mine.yaml, line 9: no such option: 'data.init_args.sources[0].pass_rate.mn'.",
        ),
        ({"few_shot": {"count": 3}}, {}, "mine.yaml, line 4: 'data.init_args.few_shot.exemplars' is missing. Give"),
        (
            {"few_shot": {"exemplars": "gsm8k_9"}},
            {},
            "source 'mine', few_shot.exemplars: there are none called 'gsm8k_9'",
        ),
        ({"few_shot": {"exemplars": "a.jsonl"}}, {}, "source 'mine', a.jsonl: there is no such file."),
        ({"read": "gsm9k"}, {}, "source 'mine': there is no format 'gsm9k'. Did you mean 'gsm8k'?"),
        (
            {"filters": [{"words": ["OpenAI"]}]},
            {},
            "source 'mine': filters.roles is ['assistant', 'text'], and the words of a prompt are the user's. Name user",
        ),
    ],
)
def test_a_setting_that_cannot_be_meant(refused, source, data, said):
    assert refused(GOOD, source, **data).startswith(said)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"class_path": "tulu_lightning.verifiers.last_number.LastNumbr"},
            "mine.yaml, line 10 (data.init_args.verifiers.judge.class_path): there is no class "
            "'tulu_lightning.verifiers.last_number.LastNumbr' (tulu_lightning.verifiers.last_number has no 'LastNumbr'). "
            f"Did you mean '{VERIFIER}'?",
        ),
        (
            {"class_path": VERIFIER, "init_args": {"rubric": "x"}},
            "mine.yaml, line 12: no such option: 'data.init_args.verifiers.judge.init_args.rubric'.",
        ),
        (
            {"class_path": "tulu_lightning.data.prompts.PromptData"},
            "mine.yaml, line 10 (data.init_args.verifiers.judge.class_path): 'tulu_lightning.data.prompts.PromptData' is no "
            "Verifier.",
        ),
    ],
)
def test_an_own_verifier_that_is_none(refused, own, said):
    assert refused(GOOD, verifiers={"judge": own}).startswith(said)


def test_an_own_verifier_is_built_and_judges_the_targets(refused):
    said = refused([prompt(verifier="mine", ground_truth="x")], verifiers={"mine": {"class_path": VERIFIER}})
    assert said.startswith("rows.jsonl, row 1: verifier 'mine' cannot use ground_truth: 'x' is not a number.")


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_prompt_longer_than_the_context(refused, stage, tiny):
    """One token a byte: 9 of the header, 14 of `What is 0 + 1?` and its newline 1, 14 of the answer's header; 8 to come."""
    folder = Path(shutil.copytree(tiny, "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    said = refused(GOOD, stage=stage, model={"backbone": {"path": str(folder)}})
    assert said.startswith("data: the longest row has 46 tokens with the 8 new ones, and the model ")
    assert said.endswith(
        "has 40 positions. Lower data.init_args.max_tokens (longer rows are dropped), or give another model."
    )


def test_a_prompt_longer_than_the_engines_room(refused):
    """38 tokens of prompt, as above, and 8 new ones: 46 fit, and would do so until that prompt is drawn."""
    engine = {"kind": "server", "url": "http://127.0.0.1:9", "max_model_len": 45}
    rollout = {"max_new_tokens": 8, "samples_per_prompt": 2, "engine": engine}
    said = refused(GOOD, model={"rollout": rollout})
    assert said == (
        "rollout.engine.max_model_len: gives 45 positions, and the longest prompt has 38 tokens with 8 new ones. Raise "
        "it, or lower data.init_args.max_tokens (longer prompts are dropped) or rollout.max_new_tokens."
    )


def test_an_engine_without_memory_for_one_sample(refused, tiny):
    """Of each of 2^15 tokens every layer keeps keys and values, 4 bytes a number: more than the megabyte that there is."""
    folder = Path(shutil.copytree(tiny, "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    kv = config["num_key_value_heads"] * config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    needed = -(-2 * config["num_hidden_layers"] * kv * 4 * 32768 // 2**20)
    rollout = {"samples_per_prompt": 2, "engine": {"kind": "server", "kv_cache_mb": needed - 1}}
    said = refused(GOOD, model={"backbone": {"path": str(folder)}, "rollout": rollout})
    assert said == (
        f"rollout.engine.kv_cache_mb: is {needed - 1}, and the keys and values of one sample of 32,768 tokens take "
        f"{needed}. Raise it, or lower rollout.engine.max_model_len."
    )


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_prompts_of_another_tokenizer(refused, stage, tiny):
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny, "other"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained("other")
    said = refused(GOOD, stage=stage, tokenizer="other")
    assert said.startswith("data.tokenizer: the rows were tokenised with that of other, and the start checkpoint ")
    assert said.endswith("has another one. Leave it out, and the rows are read with the start checkpoint's.")


def test_a_prompt_longer_than_the_limit(refused):
    long = [{"role": "user", "content": "9" * 300}]  # one token a byte: 9 before it, 1 + 14 behind it
    said = refused([*GOOD, prompt(messages=long)], on_overflow="error")
    assert said.startswith(
        "rows.jsonl, row 9: the row has 324 tokens, and max_tokens is 256. Raise max_tokens, shorten"
    )


def test_all_prompts_filtered_out(refused):
    rows = [prompt(i, pass_rate=rate) for i, rate in enumerate([0, 0, 1])]
    said = refused(rows, {"pass_rate": {"min": 0.1, "max": 0.9}})
    assert said.startswith("source 'mine': every row was left out (3 with a pass rate outside of 0.1 to 0.9).")


@pytest.mark.parametrize(
    "setting", [{"verifier": "exact"}, {"few_shot": {"exemplars": "gsm8k_8"}}, {"dataset": "MATH"}]
)
def test_what_only_prompts_have_is_no_option_of_other_rows(refused, setting):
    said = refused(GOOD, setting, stage="sft")
    assert f"no such option: 'data.init_args.sources[0].{next(iter(setting))}'" in said
