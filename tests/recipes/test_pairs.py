"""On-policy pairs: the sampled ids themselves, right against wrong, and a run that can be stopped anywhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tulu_lightning import cli
from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making import models
from tulu_lightning.recipes.making.generate import GenerateConfig
from tulu_lightning.recipes.making.judge import JudgeConfig
from tulu_lightning.recipes.making.pool import Decoding
from tulu_lightning.recipes.pairs import PairsConfig, make_pairs
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Verdict

PROMPTS = 70
"""More than two chunks, so that a run can be cut between them."""
SUMS = PromptSource("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": PROMPTS})


class Even:
    """A random model never adds; here an answer is right if it has an even number of characters."""

    runs = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        right = len(response) % 2 == 0
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target: str) -> str | None:
        return None


@pytest.fixture
def config(tmp_path):
    own = {"last_number": Even()}
    made = GenerateConfig(
        sources=[SUMS],
        model="tiny-random-llama",
        template="tulu",
        dtype="float32",
        responses=6,
        draw="each",
        decoding=Decoding(max_new_tokens=3),
        verifiers=own,
    )
    return PairsConfig(
        output=str(tmp_path / "pairs"), generate=made, judge=JudgeConfig(verify=True, verifiers=own), min_chosen=1.0
    )


@pytest.fixture(autouse=True)
def stopping(monkeypatch):
    """Two of three answers stop."""
    generate = LocalEngine.generate

    def stopping(self, *args, **kwargs):
        groups = generate(self, *args, **kwargs)
        return [[c._replace(finish="stop" if i % 3 else "length") for i, c in enumerate(g)] for g in groups]

    monkeypatch.setattr(LocalEngine, "generate", stopping)


def with_generate(config, **changes):
    return replace(config, generate=replace(config.generate, **changes))


def lines(config, name):
    return [json.loads(line) for line in Path(config.output, name).read_text().splitlines()]


def right(row):
    return row["finish"] == "stop" and len(row["response"]) % 2 == 0


def test_a_pair_is_a_right_answer_that_stopped_and_one_that_is_wrong_or_was_cut(config):
    summary = make_pairs(config)
    rows = lines(config, "pairs.jsonl")
    samples: dict[str, list] = {}
    for row in lines(config, "generate/rows-00000.jsonl"):
        samples.setdefault(row["prompt_key"], []).append(row)
    assert summary["prompts"] == PROMPTS == len(samples)
    assert summary["samples"] == 6 * PROMPTS
    assert 0 < summary["pairs"] == len(rows) <= PROMPTS
    assert summary["start_digest"] == weights_digest(resolve_model(config.generate.model))
    for row in rows:
        sides = [[s for s in samples[row["id"]] if s["ids"] == row[f"{side}_ids"]] for side in ("chosen", "rejected")]
        assert any(right(s) for s in sides[0])
        assert any(not right(s) for s in sides[1])
    alike = sum(len({right(s) for s in group}) == 1 for group in samples.values())
    assert PROMPTS - len(rows) == alike + summary["without"].get("both sides are the same text", 0) + summary[
        "without"
    ].get("a side is empty", 0)


def test_what_dpo_trains_on_are_the_ids_that_were_sampled(config, monkeypatch):
    sampled = set()
    generate = LocalEngine.generate

    def spy(self, prompts, *args, **kwargs):
        groups = generate(self, prompts, *args, **kwargs)
        sampled.update((tuple(p), tuple(c.ids_L.tolist())) for p, g in zip(prompts, groups, strict=True) for c in g)
        return groups

    monkeypatch.setattr(LocalEngine, "generate", spy)
    make_pairs(config)
    path = str(Path(config.output, "pairs.jsonl"))
    data = PreferenceData(
        sources=[Source("pairs", path=path)],
        tokenizer="tiny-random-llama",
        template="tulu",
        max_tokens=256,
        examples_per_step=8,
    )
    rows = lines(config, "pairs.jsonl")
    for document, row in zip(data.documents, rows, strict=True):
        start, *rests = (tuple(segment.ids_L.tolist()) for segment in document.segments)
        prompt = tuple(row["prompt_ids"])  # the answers may begin with the same tokens, which are shared as well
        assert start[: len(prompt)] == prompt
        assert {(prompt, (start + rest)[len(prompt) :]) for rest in rests} <= sampled
    tokenizer = load_tokenizer("tiny-random-llama")
    assert rows[0]["chosen"] == tokenizer.decode(rows[0]["chosen_ids"], skip_special_tokens=True)
    assert rows[0]["prompt"][-1]["content"] in tokenizer.decode(rows[0]["prompt_ids"])


def test_cut_in_the_middle_of_a_line_and_run_again_is_never_cut(config, tmp_path, monkeypatch):
    make_pairs(config)
    whole = Path(config.output, "generate", "rows-00000.jsonl").read_text()
    again = replace(config, output=str(tmp_path / "again"))
    make_pairs(again)
    torn = whole.splitlines(keepends=True)
    # 40 prompts and two answers of another, and a third of the next line.
    Path(again.output, "generate", "rows-00000.jsonl").write_text("".join(torn[:242]) + torn[242][:25])
    shutil.rmtree(Path(again.output, "judge"))
    for name in ("pairs.jsonl", "summary.json"):
        Path(again.output, name).unlink()
    calls = []
    generate = LocalEngine.generate

    def spy(self, prompts, *args, **kwargs):
        calls.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "generate", spy)
    make_pairs(again)
    assert sum(calls) == PROMPTS - 40, "only what was missing is sampled"
    assert Path(again.output, "generate", "rows-00000.jsonl").read_text() == whole
    assert Path(again.output, "pairs.jsonl").read_text() == Path(config.output, "pairs.jsonl").read_text()


def test_samples_of_other_settings_are_refused(config):
    make_pairs(config)
    with pytest.raises(InputError, match=r"holds rows made with decoding = .*0\.7"):
        make_pairs(with_generate(config, decoding=Decoding(3, 0.7)))
    with pytest.raises(InputError, match="holds rows made with seed = 0, not 2"):
        make_pairs(with_generate(config, seed=2))


def test_a_model_whose_weights_changed_is_another_model(config, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = with_generate(config, model=str(folder))
    make_pairs(config)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="holds rows made with models"):
        make_pairs(config)


def test_without_a_right_and_a_wrong_answer_there_is_no_pair(config):
    config = replace(with_generate(config, verifiers={}), judge=JudgeConfig(verify=True))
    with pytest.raises(InputError, match=r"no prompt makes a pair .*no response is good enough"):
        make_pairs(config)


def test_held_out_prompts_and_shares(config):
    whole = make_pairs(config)
    split = replace(config, held_out_share=0.3)
    with pytest.raises(InputError, match=r"made with held_out_share = 0\.0, not 0\.3"):
        make_pairs(split)
    summary_file = Path(config.output, "summary.json")
    summary_file.unlink()  # what was generated and judged stays
    summary = make_pairs(split)
    train, held = lines(split, "pairs.jsonl"), lines(split, "held_out.jsonl")
    assert len(train) + len(held) == whole["pairs"]
    assert summary["held_out"] == len(held) > 0
    assert not {row["id"] for row in train} & {row["id"] for row in held}
    assert all(int(row["id"][:8], 16) / 16**8 < 0.3 for row in held)
    assert summary["on_policy"] == whole["pairs"], "all are the checkpoint's own"
    summary_file.unlink()
    with pytest.raises(InputError, match="no prompt makes a pair"):
        make_pairs(replace(config, on_policy_share=0.0))


def test_folders_that_the_chain_would_not_use_are_refused(config):
    for name, made in (("generate", config.generate), ("judge", config.judge)):
        with pytest.raises(InputError, match=rf"{name}\.output: is 'elsewhere'"):
            make_pairs(replace(config, **{name: replace(made, output="elsewhere")}))
    with pytest.raises(InputError, match=r"judge\.input: is 'elsewhere'"):
        make_pairs(replace(config, judge=replace(config.judge, input="elsewhere")))


def test_neither_a_source_nor_a_maker_of_ratings_is_an_error(config):
    with pytest.raises(InputError, match="neither or both of ratings and judge"):
        make_pairs(replace(config, judge=None))
    with pytest.raises(InputError, match="neither or both of input and generate"):
        make_pairs(replace(config, input="somewhere"))


def test_the_command_chains_the_three_and_each_can_be_called_alone(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.CHUNKS, "local", 4)
    shared = (
        "model: tiny-random-llama\ntemplate: tulu\nresponses: 6\ndraw: each\ndecoding: {max_new_tokens: 3}\n"
        "sources: [{name: sums, rows: tulu_lightning.assets.arithmetic.prompt_rows, args: {count: 8}}]\n"
    )
    chain = tmp_path / "chain.yaml"
    chain.write_text(
        f"output: {tmp_path}/chain\nliteral: true\njudge: {{verify: true}}\ngenerate:\n"
        + "".join(f"  {line}\n" for line in shared.splitlines())
    )
    assert cli.main(["pairs", "--config", str(chain)]) == 0
    said = capsys.readouterr().out
    assert f"pairs of 8 prompts: {tmp_path}/chain/pairs.jsonl" in said
    (tmp_path / "generate.yaml").write_text(f"output: {tmp_path}/responses\n{shared}")
    assert cli.main(["generate", "--config", str(tmp_path / "generate.yaml")]) == 0
    (tmp_path / "judge.yaml").write_text(f"input: {tmp_path}/responses\noutput: {tmp_path}/ratings\nverify: true\n")
    assert cli.main(["judge", "--config", str(tmp_path / "judge.yaml")]) == 0
    (tmp_path / "pairs.yaml").write_text(
        f"input: {tmp_path}/responses\nratings: {tmp_path}/ratings\noutput: {tmp_path}/alone\nliteral: true\n"
    )
    assert cli.main(["pairs", "--config", str(tmp_path / "pairs.yaml")]) == 0
    alone, chained = ((tmp_path / name / "pairs.jsonl").read_text() for name in ("alone", "chain"))
    assert alone == chained
    rows = [json.loads(line) for line in alone.splitlines()]
    lengths = json.loads((tmp_path / "alone" / "summary.json").read_text())["lengths"]
    means = [sum(len(row[f"{side}_ids"]) for row in rows) / len(rows) for side in ("chosen", "rejected")]
    assert (lengths["pairs"], lengths["chosen"], lengths["rejected"]) == (len(rows), *means)
