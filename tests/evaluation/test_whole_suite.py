"""All of the development suite, asked of a tiny model as training asks it: `callbacks.suite.Suite` over toy rows."""

import json
import math
import sys
from pathlib import Path

import pytest

from tulu_lightning.callbacks.suite import Suite
from tulu_lightning.data import chat
from tulu_lightning.evaluation import alpaca_judge, judges, rows
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.run import Model, run_task
from tulu_lightning.evaluation.suite import SUITES
from tulu_lightning.evaluation.tasks.popqa import RELATIONS
from tulu_lightning.rollout.local import LocalEngine

sys.path.append(str(Path(__file__).parents[1] / "verifiers"))
from chat_toy import Server

CODE = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 1\n"}
MMLU = {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}
IFEVAL = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
DROP = {"query_id": "q", "passage": "p", "question": "q", "answers": [["a"]]}
ROWS = {
    "mmlu": [MMLU],
    "popqa": [
        {"id": r, "prop_id": r, "question": "q", "obj": "o", "possible_answers": '["o"]'} for r in reversed(RELATIONS)
    ],
    "truthfulqa": [{"question": "q", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}],
    "bbh": [{"subtask": "navigate", "input": "i", "target": "No"}],
    "drop": [DROP],
    "math": [{"problem": "p", "solution": "\\boxed{1}", "answer": "1", "type": "Algebra"}],
    "gsm8k": [{"question": "q", "answer": "#### 1"}],
    "humaneval": [{**CODE, "entry_point": "f"}],
    "humaneval_plus": [{**CODE, "entry_point": "f"}],
    "ifeval": [IFEVAL],
    "alpaca_eval": [{"instruction": "i", "output": "o", "dataset": "d"}],
    "alpaca_eval_gamed": [
        {"index": i, "preference": 0.5, "std_delta_len": (-1) ** i, "instruction_difficulty": i % 5} for i in range(805)
    ],
    "harmbench": [{"FunctionalCategory": "standard", "Behavior": "b"}],
    "xstest": [{"prompt": "p", "label": "safe"}],
    "wildguardtest": [
        {"prompt": "p", "adversarial": False, "prompt_harm_label": "harmful", "response_harm_label": "harmful"}
    ],
    "jailbreaktrigger": [{"prompt": "p", "label": ["cot"]}],
    "do_anything_now": [{"adversarial": "p"}],
    "wildjailbreak": [{"adversarial": "p", "data_type": "adversarial_harmful"}],
}


@pytest.mark.slow
def test_the_development_suite_runs_from_end_to_end(tiny, tmp_path, monkeypatch):
    if package_file("lm-eval", "lm_eval/tasks/bbh") is None:
        pytest.skip("lm-eval is not installed")
    monkeypatch.setattr(rows, "_given", {})
    monkeypatch.setattr(judges, "_named", {})
    monkeypatch.setattr(alpaca_judge, "template", lambda: "<|im_start|>user\n{output_1} or {output_2}?<|im_end|>")
    server = Server()
    first = [{"token": token, "logprob": math.log(0.5)} for token in "mM"]
    choice = {"message": {"content": "m"}, "logprobs": {"content": [{"top_logprobs": first}]}}
    server.replies = lambda request: (200, json.dumps({"choices": [choice]}), {})
    data = {}
    for name, content in ROWS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        data[name] = str(tmp_path / f"{name}.json")
    who = {"alpaca_eval": f"toy@{server.url}", "safety": "keywords"}
    suite = Suite(["tulu3_dev"], limit=6, max_new_tokens=4, data=data, judges=who)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asker = Asker(tokenizer, chat.chat_template("chatml", tokenizer), "tiny")
    model = Model("tiny", "d", LocalEngine.from_folder(tiny), asker, (258,))
    found = {task.name: run_task(task, examples, model) for task, examples in suite.read()}
    server.http.shutdown()
    server.http.server_close()
    assert list(found) == list(SUITES["tulu3_dev"])
    assert found["safety"].n == 6
    assert found["alpaca_eval"].items[0]["answers"][0]["score"] == pytest.approx(0.5)
    assert all(result.n >= 1 and math.isfinite(result.score) for result in found.values())
    outcomes = {item["answers"][0]["outcome"] for result in found.values() for item in result.items}
    assert "error" not in outcomes
