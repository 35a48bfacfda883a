"""One run of TRL's GRPOTrainer on given prompts, timed by whole steps and by phase; started by benchmarks/rlvr.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout. The trainer is TRL's own, sampling with
transformers' generate; only clocks are put around its methods. The reward is a coin (`coin.py`), on both sides. `"weights": "bfloat16"` stores the weights in bf16, which is faster and is another computation: updates are lost.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import datasets
import jobs
import torch
from coin import Coin
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_clock import Clock, common

PHASES = {
    "generate": "_generate_single_turn",
    "score": "_calculate_rewards",
    "prepare": "_generate_and_score_completions",
}


class Timed(GRPOTrainer):
    """TRL's trainer with counters and clocks; `prepare` is all that comes before training, the other phases included."""

    micros: list[dict[str, int]]
    spent: dict[str, float]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        batch: Any = self._buffered_inputs[(self._step - 1) % len(self._buffered_inputs)]  # the one just trained
        mask, prompt = batch["completion_mask"], batch["prompt_mask"]
        ids = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        self.micros.append({"tokens": int(mask.sum() + prompt.sum()), "trained": int(mask.sum()), "computed": ids})
        return loss


def clocked(phase: str, name: str) -> None:
    """Add up the time that a method of the trainer takes."""
    method = getattr(GRPOTrainer, name)

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.spent[phase] += time.perf_counter() - started

    setattr(Timed, name, timed)


class PhaseClock(Clock):
    """Seconds of each phase, step by step."""

    def __init__(self, trainer: Timed) -> None:
        super().__init__(trainer.micros)
        self.trainer, self.phases = trainer, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, **kwargs)
        self.phases.append(dict(self.trainer.spent))
        self.trainer.spent.update(dict.fromkeys(self.trainer.spent, 0.0))


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    datasets.disable_progress_bars()
    settings, verifier = job["settings"], Coin()
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    started = time.perf_counter()
    stored = getattr(torch, settings.get("weights", "float32"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=stored)

    def reward(completions: list[Any], target: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [10 * verifier(text, wanted).score for text, wanted in zip(texts, target, strict=True)]

    Timed.micros, Timed.spent = [], dict.fromkeys(PHASES, 0.0)
    for phase, name in PHASES.items():
        clocked(phase, name)
    own = common(job)
    for name in ("train_sampling_strategy", "dataset_num_proc"):  # GRPO samples and prepares in its own way
        own.pop(name)
    config = GRPOConfig(
        **own,
        num_generations=job["group"],
        generation_batch_size=job["prompts_per_step"] * job["group"],
        max_completion_length=job["new_tokens"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]} if job["forced"] else None,
        temperature=1.0,
        beta=0.0,
        loss_type="bnpo",
        use_cpu=job["accelerator"] == "cpu",
    )
    prompts = [{"prompt": row["messages"], "target": row["ground_truth"]} for row in rows]
    trainer = Timed(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
        reward_funcs=reward,
    )
    clock = PhaseClock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    found = clock.times(started)
    rewards = [log.get("reward") for log in trainer.state.log_history if "reward" in log]
    return {
        **found,
        "phases": clock.phases,
        "rewards": rewards,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    jobs.run(main)
