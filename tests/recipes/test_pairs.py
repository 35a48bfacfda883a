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
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.recipes import pairs
from tulu_lightning.recipes.pairs import PairsConfig, make_pairs
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Verdict

PROMPTS = 70
"""More than two chunks, so that a run can be cut between them."""


@pytest.fixture
def config(tmp_path):
    prompts = Source("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": PROMPTS})
    return PairsConfig(
        model="tiny-random-llama",
        output=str(tmp_path / "pairs"),
        sources=[prompts],
        samples_per_prompt=6,
        max_new_tokens=3,
        template="tulu",
    )


@pytest.fixture
def judged(monkeypatch):
    """A random model never adds; here an answer is right if its first byte is even, and two of three stop."""

    def verdict(completion):
        right = int(completion.ids_L[0]) % 2 == 0
        return Verdict("right" if right else "wrong", float(right))

    monkeypatch.setattr(pairs, "score_all", lambda jobs, tokenizer: [verdict(c) for _, c in jobs])
    generate = LocalEngine.generate

    def stopping(self, *args, **kwargs):
        groups = generate(self, *args, **kwargs)
        return [[c._replace(finish="stop" if i % 3 else "length") for i, c in enumerate(g)] for g in groups]

    monkeypatch.setattr(LocalEngine, "generate", stopping)


def lines(config, name):
    return [json.loads(line) for line in Path(config.output, name).read_text().splitlines()]


def test_a_pair_is_a_right_answer_that_stopped_and_one_that_is_wrong_or_was_cut(config, judged):
    summary = make_pairs(config)
    rows = lines(config, "pairs.jsonl")
    groups = {record["row"]: record["samples"] for record in lines(config, "samples.jsonl")}
    assert summary["prompts"] == PROMPTS == len(groups)
    assert summary["samples"] == 6 * PROMPTS
    assert 0 < summary["pairs"] == len(rows) <= PROMPTS
    assert summary["start_digest"] == weights_digest(resolve_model(config.model))
    prompts = {tuple(prompt["ids"]): prompt["row"] for prompt in _prompts(config)}
    for row in rows:
        group = groups[prompts[tuple(row["prompt_ids"])]]
        chosen, rejected = ([s for s in group if s["ids"] == row[f"{side}_ids"]] for side in ("chosen", "rejected"))
        assert any(s["outcome"] == "right" and s["finish"] == "stop" for s in chosen)
        assert any(s["outcome"] == "wrong" or s["finish"] == "length" for s in rejected)
    without = {row for row, group in groups.items() if len({s["right"] for s in group}) == 1}
    assert len(rows) == PROMPTS - len(without)


def _prompts(config):
    data = PromptData(
        sources=config.sources, tokenizer=config.model, max_tokens=256, examples_per_step=1, template="tulu"
    )
    return [{"ids": prompt.ids, "row": prompt.row} for prompt in data.prompts]


def test_what_dpo_trains_on_are_the_ids_that_were_sampled(config, judged, monkeypatch):
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
        tokenizer=config.model,
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
    tokenizer = load_tokenizer(config.model)
    row = lines(config, "pairs.jsonl")[0]
    assert row["chosen"] == tokenizer.decode(row["chosen_ids"], skip_special_tokens=True)


def test_the_prompt_beside_a_pair_is_its_own_also_where_rows_were_left_out(config, judged, tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = [f"{'x' * (300 if i % 3 == 0 else 3)} {i}" for i in range(24)]
    rows = [{"messages": [{"role": "user", "content": t}], "ground_truth": "1", "verifier": "exact"} for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, sources=[Source("prompts", path=str(path))], max_tokens=256)
    assert make_pairs(config)["prompts"] == 16, "every third is longer than 256 bytes"
    tokenizer = load_tokenizer(config.model)
    made = lines(config, "pairs.jsonl")
    assert len(made) > 4
    for row in made:
        assert row["prompt"][-1]["content"] in tokenizer.decode(row["prompt_ids"])


def test_cut_in_the_middle_of_a_line_and_run_again_is_never_cut(config, judged, tmp_path):
    make_pairs(config)
    whole = Path(config.output, "samples.jsonl").read_text()
    again = replace(config, output=str(tmp_path / "again"))
    make_pairs(again)
    torn = whole.splitlines(keepends=True)
    Path(again.output, "samples.jsonl").write_text("".join(torn[:40]) + torn[40][:25])
    Path(again.output, "pairs.jsonl").unlink()
    Path(again.output, "summary.json").unlink()

    calls = []
    generate = LocalEngine.generate

    def spy(self, prompts, *args, **kwargs):
        calls.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "generate", spy)
        make_pairs(again)
    assert sum(calls) == PROMPTS - 40, "only what was missing is sampled"
    assert Path(again.output, "samples.jsonl").read_text() == whole
    assert Path(again.output, "pairs.jsonl").read_text() == Path(config.output, "pairs.jsonl").read_text()


def test_samples_of_other_settings_are_refused(config, judged, tiny, tmp_path):
    make_pairs(config)
    with pytest.raises(InputError, match="holds samples made with other settings"):
        make_pairs(replace(config, temperature=0.7))
    with pytest.raises(InputError, match="holds samples made with other settings"):
        make_pairs(replace(config, seed=2))


def test_a_model_whose_weights_changed_is_another_model(config, judged, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = replace(config, model=str(folder))
    make_pairs(config)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="holds samples made with other settings"):
        make_pairs(config)


def test_without_a_right_and_a_wrong_answer_there_is_no_pair(config, tmp_path):
    with pytest.raises(InputError, match="no prompt got both a right and a wrong response"):
        make_pairs(replace(config, sources=[Source("s", rows=config.sources[0].rows, args={"count": 2})]))


def test_the_command_writes_the_file_and_says_so(config, judged, tmp_path, capsys):
    path = tmp_path / "pairs.yaml"
    path.write_text(
        "model: tiny-random-llama\ntemplate: tulu\nsamples_per_prompt: 6\nmax_new_tokens: 3\n"
        f"output: {config.output}\n"
        "sources: [{name: sums, rows: tulu_lightning.assets.arithmetic.prompt_rows, args: {count: 8}}]\n"
    )
    assert cli.main(["pairs", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"of 8 prompts: {config.output}/pairs.jsonl" in said
    rows = lines(config, "pairs.jsonl")
    chosen, rejected = (sum(len(row[f"{side}_ids"]) for row in rows) / len(rows) for side in ("chosen", "rejected"))
    assert f"mean tokens: chosen {chosen:.1f}, rejected {rejected:.1f}; chosen is longer in" in said
    lengths = json.loads(Path(config.output, "summary.json").read_text())["lengths"]
    assert (lengths["pairs"], lengths["chosen"], lengths["rejected"]) == (len(rows), chosen, rejected)
