"""One run of our GRPO on given prompts, timed by whole steps and by phase; started by benchmarks/rlvr.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout, as peers/trl_grpo.py does.
"""

import json
import time
from pathlib import Path
from typing import Any

import jobs
import lightning as L
import torch
from coin import Coin
from ours_clock import QUIET, Clock

from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.core.correction import Correction
from tulu_lightning.core.groups import GRPO
from tulu_lightning.core.kl import Kl
from tulu_lightning.core.overlong import Overlong
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sources import Source
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Rollout
from tulu_lightning.verifiers import registry

PHASES = ("generate", "score", "sync", "logprobs", "update")


class Endless(PPO):
    """Listens to no stop token where every response has to have the same length."""

    forced = True

    def stop_ids(self) -> tuple[int, ...]:
        return () if self.forced else super().stop_ids()


class StepClock(Clock):
    """Rollouts are packed by the stage: the batch holds prompts only."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.metrics.append(dict(pl_module.metrics))


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    registry.VERIFIERS["coin"] = Coin()
    rows = [{**json.loads(line), "verifier": "coin"} for line in Path(job["rows"]).read_text().splitlines()]
    path = Path(job["rows"]).with_suffix(".coin.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptData(
        sources=[Source("prompts", path=str(path))],
        tokenizer=job["model"],
        template=job["template"],
        max_tokens=2048,
        examples_per_step=job["prompts_per_step"],
        max_steps=job["warmup"] + job["steps"],
    )
    started = time.perf_counter()
    Endless.forced, settings = job["forced"], job["settings"]
    stage = Endless(
        Backbone(job["model"], compute_dtype=job["dtype"], **settings.get("backbone", {})),
        AdamW(lr=job["lr"], schedule="constant", weight_decay=0.0, max_grad_norm=1.0),
        Rollout(job["new_tokens"], samples_per_prompt=job["group"], engine=EngineSettings(dtype=job["dtype"])),
        advantage=GRPO(),
        overlong=Overlong("none"),
        kl=Kl(0.0),
        correction=Correction("none"),
        epochs=1,
        micro_tokens=settings.get("micro_tokens", 4096),
    )
    clock = StepClock()
    refresh = RolloutRefresh(**settings.get("refresh", {}))
    trainer = L.Trainer(
        accelerator=job["accelerator"],
        devices=1,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[clock, refresh],
        **QUIET,
    )
    trainer.fit(stage, data)
    return {
        **clock.times(started),
        "computed": [int(step["tokens"]) for step in clock.metrics],
        "trained": [int(step["responses"] * step["length"]) for step in clock.metrics],
        "phases": [{name: step[f"seconds_{name}"] for name in PHASES} for step in clock.metrics],
        "rewards": [step["reward"] for step in clock.metrics],
    }


if __name__ == "__main__":
    jobs.run(main)
