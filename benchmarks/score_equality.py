"""Our tasks by our engine, and the same requests by lm-evaluation-harness's own model of transformers: item by item.

    python benchmarks/score_equality.py --limit 114 mmlu_mc_plain drop gsm8k_plain

Both get the task's prompts and its stops; answers of both are judged by the task's verifier. What differs is named. One line of
JSON a task.
"""

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.evaluation.asking import answer_text
from tulu_lightning.evaluation.command import Settings, open_model
from tulu_lightning.evaluation.run import run_task
from tulu_lightning.evaluation.suite import find_task
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.verifiers.registry import Verifiers


def by_harness(task: Any, examples: Any, lm: HFLM) -> list[str]:
    """What a verifier reads of the harness's model's answer to each example."""
    if examples[0].choices:
        asked = [SimpleNamespace(args=(e.turns[0].content, choice)) for e in examples for choice in e.choices]
        found = iter(lm.loglikelihood(asked))
        return [json.dumps([round(next(found)[0], 6) for _ in e.choices]) for e in examples]
    wanted = {"until": list(task.stops), "max_gen_toks": task.max_new_tokens, "do_sample": False}
    asked = [SimpleNamespace(args=(e.turns[0].content + e.prefix, dict(wanted))) for e in examples]
    return [answer_text(text, e.prefix, task.stops) for e, text in zip(examples, lm.generate_until(asked), strict=True)]


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--batch", type=int, default=1, help="the harness's; our engine chooses its own")
    options = parser.parse_args()
    model = open_model(options.model, Settings(None, None, EngineSettings(dtype="float32"), 0))  # type: ignore[arg-type]
    lm = HFLM(str(resolve_model(options.model)), dtype="float32", device="cpu", batch_size=options.batch)
    for name in options.tasks:
        task = find_task(name)
        examples = task.examples(options.limit)
        started = time.perf_counter()
        ours = run_task(task, examples, model)
        ours_took = time.perf_counter() - started
        started = time.perf_counter()
        texts = by_harness(task, examples, lm)
        theirs_took = time.perf_counter() - started
        with Scorer(Verifiers({} if task.own is None else {task.verifier: task.own})) as scorer:
            verdicts = scorer.verdicts([Job(task.verifier, t, e.target) for t, e in zip(texts, examples, strict=True)])
        other = [
            item["key"] for item, v in zip(ours.items, verdicts, strict=True) if abs(item["score"] - v.score) > 1e-9
        ]
        same = sum(item["answers"][0]["text"] == text for item, text in zip(ours.items, texts, strict=True))
        told = {"task": name, "n": ours.n, "ours": ours.score, "items_with_another_score": other}
        if not examples[0].choices:
            told["answers_equal"] = same
        told |= {"seconds_ours": round(ours_took, 1), "seconds_harness": round(theirs_took, 1)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
