"""Our tasks by our engine, and lm-evaluation-harness's own tasks by its own model of transformers: scores item by item.

    python benchmarks/harness_tasks.py ifeval gsm8k_plain mmlu_mc_plain drop --limit 60 --batch 8

The harness judges by its own rules and asks in its own words (MMLU with its shots, IFEval in its chat template), or, where the
paper asks in others (GSM8K, DROP), in the paper's. It reads the rows that we read. With `--lm ours` its model is ours, too
(`evaluation.harness_lm`), and gives the answer again that it gave to the same text: what is compared then are requests and rules, on
whole sets in a tenth of the time.
`score_equality.py` compares more tasks by our verifiers. One line of JSON a task and metric; answers of the harness are kept in
--cache, so a run that was killed goes on.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import langdetect
import lm_eval
import yaml

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.evaluation.command import Settings, open_model
from tulu_lightning.evaluation.harness import check_harness
from tulu_lightning.evaluation.harness_lm import HarnessLM
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.run import run_task
from tulu_lightning.evaluation.suite import find_task
from tulu_lightning.evaluation.task import Example, Task
from tulu_lightning.evaluation.tasks import mmlu
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.verifiers.registry import Verifiers

THEIR_TASKS = Path(lm_eval.__file__).parent / "tasks"
ASKED = {"doc_to_text": "{{text}}", "num_fewshot": 0}
"""Our request in place of the harness's own words."""


class Twin(NamedTuple):
    """A task of the harness that is one of ours."""

    include: Callable[[str | None], str]
    """Its file, by the example's group."""
    row: Callable[[Example], Mapping[str, Any]]
    """What its rules read of an example."""
    metrics: Mapping[str, str | None]
    """Its metrics, and the verifier of ours that is the same; None for the task's own."""
    changed: Mapping[str, Any] = {}
    chat: bool = False
    max_new_tokens: int | None = None
    """A cap in place of our task's."""


def _mmlu(example: Example) -> Mapping[str, Any]:
    """The row itself: the harness words it and adds its shots."""
    return mmlu.DATA.read()[int(example.key.rpartition("/")[2])]


TWINS = {
    "ifeval": Twin(
        lambda group: "ifeval/ifeval.yaml",
        lambda e: {"key": e.key, "prompt": e.turns[0].content, **json.loads(e.target)},
        {"prompt_level_loose_acc,none": None, "prompt_level_strict_acc,none": "ifeval"},
        chat=True,
        max_new_tokens=1280,  # the harness's own
    ),
    "gsm8k_plain": Twin(
        lambda group: "gsm8k/gsm8k-cot.yaml",
        lambda e: {"text": e.turns[0].content, "target": e.target},
        {"exact_match,flexible-extract": None},
        ASKED,
    ),
    "drop": Twin(
        lambda group: "drop/default.yaml",
        lambda e: {"text": e.turns[0].content, "answers": json.loads(e.target)},
        {"f1,none": None},
        {
            **ASKED,
            "process_docs": None,
            "doc_to_target": "",
            "doc_to_decontamination_query": None,
            "training_split": None,
            "validation_split": None,
            "should_decontaminate": False,
        },
    ),
    "mmlu_mc_plain": Twin(
        lambda group: f"mmlu/default/mmlu_{group}.yaml",
        _mmlu,
        {"acc,none": None},
    ),
}


def written(task: Task, examples: Sequence[Example], folder: Path) -> dict[str, list[int]]:
    """Writes the harness's tasks, one a group, each with its rows; returns the places of each one's examples."""
    twin = TWINS[task.name]
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.group or "", []).append(place)
    named = {}
    for i, (group, mine) in enumerate(places.items()):
        name = f"{task.name}_twin_{i}"
        files = {"test": [twin.row(examples[place]) for place in mine]}
        told = {"include": str(THEIR_TASKS / twin.include(group)), "task": name, "dataset_path": "json"}
        told |= {"dataset_name": None, "test_split": "test", "tag": None, **twin.changed}
        if examples[mine[0]].choices:
            files["dev"] = [row for row in mmlu.SHOT_DATA.read() if row["subject"] == group]
            told["num_fewshot"] = task.shots
        else:
            told["generation_kwargs"] = {
                "until": list(task.stops), "max_gen_toks": task.max_new_tokens, "do_sample": False
            }  # fmt: skip
        for split, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")
        told["dataset_kwargs"] = {"data_files": {split: str(folder / f"{name}_{split}.jsonl") for split in files}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
        named[name] = mine
    return named


class Ours(HarnessLM):
    """Our model for the harness; a text that was answered before gets the same answer."""

    answers: Mapping[str, str] = {}
    again = 0

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Known answers, and new ones to the rest."""
        new = [request for request in requests if request.args[0] not in self.answers]
        self.again = len(requests) - len(new)
        made = iter(super().generate_until(new, disable_tqdm) if new else ())
        return [self.answers[r.args[0]] if r.args[0] in self.answers else next(made) for r in requests]


def ready() -> None:
    """The harness's IFEval wants a dict that cannot change, where any dict will do, and a model of NLTK's that packages hold.

    It draws when it guesses a language, and judges one text this way and that; with our seed it judges as we do.
    """
    langdetect.DetectorFactory.seed = 0
    if find_spec("immutabledict") is None:
        sys.modules["immutabledict"] = SimpleNamespace(immutabledict=dict)  # type: ignore[assignment]
    punkt = package_file("llama-index-core", "llama_index/core/_static/nltk_cache")
    if punkt is not None:
        os.environ.setdefault("NLTK_DATA", str(punkt))


def by_harness(lm: Any, task: Task, examples: Sequence[Example], cache: str | None) -> list[dict[str, Any]]:
    """What the harness finds of each example: its metrics, by name and filter, and `text`, its model's answer."""
    from lm_eval.evaluator import simple_evaluate

    found: list[dict[str, Any]] = [{} for _ in examples]
    with tempfile.TemporaryDirectory() as folder:
        named = written(task, examples, Path(folder))
        done: Any = simple_evaluate(
            lm, tasks=list(named), task_manager=check_harness(list(named), folder), bootstrap_iters=0, log_samples=True,
            apply_chat_template=TWINS[task.name].chat, use_cache=cache,
        )  # fmt: skip
    for name, places in named.items():
        for sample in done["samples"][name]:
            item = found[places[sample["doc_id"]]]
            item["text"] = sample["resps"][0][0]
            item |= {f"{metric},{sample['filter']}": sample[metric] for metric in sample["metrics"]}
    return found


def judged(task: Task, ours: TaskResult, examples: Sequence[Example], verifier: str | None) -> list[float]:
    """Scores of our answers, by the task's verifier or another one."""
    if verifier is None:
        return [item["score"] for item in ours.items]
    jobs = [Job(verifier, i["answers"][0]["text"], e.target) for i, e in zip(ours.items, examples, strict=True)]
    with Scorer(Verifiers()) as scorer:
        return [verdict.score for verdict in scorer.verdicts(jobs)]


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=list(TWINS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch", type=int, default=1, help="the harness's; our engine chooses its own")
    parser.add_argument("--lm", choices=("harness", "ours"), default="harness", help="whose model the harness asks")
    parser.add_argument("--cache", help="where the harness's answers are kept")
    options = parser.parse_args()
    ready()
    from lm_eval.models.huggingface import HFLM

    model = open_model(options.model, Settings(None, None, EngineSettings(dtype="float32"), 0))  # type: ignore[arg-type]
    if options.lm == "ours":
        lm: Any = Ours(options.model, EngineSettings(dtype="float32"))
    else:
        lm = HFLM(str(resolve_model(options.model)), dtype="float32", device="cpu", batch_size=options.batch)
    for name in options.tasks:
        task, twin = find_task(name), TWINS[name]
        cap = options.max_new_tokens or twin.max_new_tokens or task.max_new_tokens
        task = replace(task, max_new_tokens=cap)
        examples = task.examples(options.limit)
        started = time.perf_counter()
        ours = run_task(task, examples, model)
        ours_took = time.perf_counter() - started
        if options.lm == "ours":
            said = (item["answers"][0]["text"] for item in ours.items)
            both = zip(examples, said, strict=True)
            lm.answers = {e.turns[0].content + e.prefix: text.removeprefix(e.prefix) for e, text in both}
        started = time.perf_counter()
        theirs = by_harness(lm, task, examples, options.cache)
        theirs_took = time.perf_counter() - started
        for metric, verifier in twin.metrics.items():
            mine = judged(task, ours, examples, verifier)
            other = [float(item[metric]) for item in theirs]
            told = {"task": name, "metric": metric, "n": len(mine), "ours": fmean(mine), "harness": fmean(other)}
            told["items_with_another_score"] = [
                e.key for e, a, b in zip(examples, mine, other, strict=True) if abs(a - b) > 1e-6
            ]
            if not examples[0].choices:
                texts = [item["answers"][0]["text"] for item in ours.items]
                told["answers_equal"] = sum(a == b["text"] for a, b in zip(texts, theirs, strict=True))
                told["max_new_tokens"] = cap
            told["lm"] = options.lm
            if options.lm == "ours":
                told["answered_before"] = lm.again
            told |= {"seconds_ours": round(ours_took, 1), "seconds_harness": round(theirs_took, 1)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
