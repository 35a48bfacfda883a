"""A run folder as the recipe leaves it: four stages, curves with noise, scores, rollouts with awkward text."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from tulu_lightning.evaluation.heldout import Item, Scores

HOSTILE = '</script><script>alert("x")</script><img src="https://evil.example/a.png" onerror=alert(1)> & \u202e \ud800'


CAP = 40
"""Most tokens of a held-out answer."""


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scores(accuracy: float, n: int = 300, tokens: Sequence[int] = (3,)) -> Scores:
    """As the evaluation writes them, so that writer and reader cannot drift apart. `tokens`: lengths, in turn."""
    right = round(accuracy * n)
    items = tuple(
        Item(
            row=row,
            prompt="What is 31+27?",
            target="58",
            response="58" if row < right else "57",
            outcome="right" if row < right else "wrong",
            score=float(row < right),
            tokens=tokens[row % len(tokens)],
            finish="length" if tokens[row % len(tokens)] == CAP else "stop",
        )
        for row in range(n)
    )
    return Scores("heldout", 1, "a1b2c3", 0, items)


def common(stage: str, step: int, loss: float, rng: random.Random) -> dict:
    return {
        "stage": stage,
        "step": step,
        "time": 1.7e9 + step,
        "seconds": 2.5 + rng.random(),
        "loss": loss + rng.gauss(0, 0.04),
        "grad_norm": 1.5 + rng.gauss(0, 0.2),
        "lr": 1e-5 * min(1.0, (step + 1) / 10),
        "tokens": 2048,
        "trained_tokens": 700,
    }


def sft_row(step: int, rng: random.Random) -> dict:
    loss = 0.6 + 1.8 * math.exp(-step / 12)
    row = common("sft", step, loss, rng)
    return {**row, "loss/arithmetic": row["loss"] - 0.4 + rng.gauss(0, 0.05), "loss/chat": row["loss"] + 0.7}


def dpo_row(step: int, rng: random.Random) -> dict:
    margin = 3 * (1 - math.exp(-step / 15)) + rng.gauss(0, 0.3)
    return {
        **common("dpo", step, math.log1p(math.exp(-margin)), rng),
        "rewards_chosen": 0.3 * margin,
        "rewards_rejected": -0.7 * margin,
        "margin": margin,
        "accuracy": min(1.0, 0.5 + 0.15 * max(margin, 0)),
        "length_chosen": 4 + rng.random(),
        "length_rejected": 5 + rng.random(),
        "logp_chosen": -3 - 0.05 * step + rng.gauss(0, 0.1),
        "logp_rejected": -4 - 0.15 * step + rng.gauss(0, 0.1),
        "kl_chosen": 0.001 * step,
        "kl_rejected": 0.004 * step,
        "pairs": 32,
        "accuracy/sums": min(1.0, 0.6 + 0.15 * max(margin, 0)),
        "accuracy/chat": min(1.0, 0.4 + 0.15 * max(margin, 0)),
    }


def ppo_row(step: int, rng: random.Random) -> dict:
    right = 0.42 + 0.28 * (1 - math.exp(-step / 20)) + rng.gauss(0, 0.04)
    return {
        **common("ppo", step, 0.05, rng),
        "reward": 10 * right - 0.4,
        "score": right,
        "kl": 0.002 * step + abs(rng.gauss(0, 0.004)),
        "k3": 0.002 * step,
        "length": 4.3 + rng.gauss(0, 0.2),
        "stop_share": 1 - 0.02 * rng.random(),
        "entropy": 0.9 * math.exp(-step / 40) + 0.2 + rng.gauss(0, 0.02),
        "ratio_mean": 1 + rng.gauss(0, 0.002),
        "ratio_max": 1.3 + rng.random(),
        "clip_share": 0.02 + 0.02 * rng.random(),
        "value_clip_share": 0.05 * rng.random(),
        "explained_variance": 0.7 * (1 - math.exp(-step / 10)) - 0.1 + rng.gauss(0, 0.05),
        "policy_loss": rng.gauss(0, 0.01),
        "value_loss": 8 * math.exp(-step / 15) + 2 + rng.random(),
        "advantage_std": 1.0,
        "mismatch_kl": 1e-6 * rng.random(),
        "critic_grad_norm": 3 + rng.random(),
        "seconds_generate": 4 + rng.random(),
        "seconds_score": 0.1,
        "seconds_logprobs": 1 + 0.2 * rng.random(),
        "seconds_update": 3 + rng.random(),
        "version": step,
        "outcome_right": right,
        "outcome_wrong": 0.95 - right,
        "outcome_unparseable": 0.05,
        "outcome_error": 0.0,
    }


def rollouts(steps: int, rng: random.Random) -> list[dict]:
    rows = []
    for step in range(steps):
        for _ in range(8):
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            right = rng.random() < 0.45 + 0.3 * step / steps
            rows.append(
                {
                    "step": step,
                    "prompt": f"What is {a}+{b}?",
                    "response": str(a + b if right else a + b + rng.choice([-10, -1, 1, 10])),
                    "outcome": "right" if right else "wrong",
                    "score": float(right),
                    "reward": 10.0 * right - 0.05,
                    "advantage": rng.gauss(0, 1),
                    "tokens": 4,
                    "finish": "stop",
                }
            )
    hostile = {"prompt": HOSTILE, "response": HOSTILE, "outcome": "unparseable", "score": 0.0, "reward": -10.0}
    return [{"step": 0, **hostile, "advantage": -1.2, "tokens": 24, "finish": "length"}, *rows]


ROWS = {"sft": sft_row, "dpo": dpo_row, "ppo": ppo_row}
STEPS = {"sft": 40, "dpo": 50, "ppo": 60}
ACCURACY = {"sft": (0.12, 0.43), "dpo": (0.43, 0.45), "ppo": (0.45, 0.68)}
TOKENS = {"sft": ((12, 25, 40, 31), (3,)), "dpo": ((3, 3, 4), (3, 4, 6, 9, 40)), "ppo": ((3, 4, 6, 9, 40), (3, 4))}
GAIN = {"sft": (0.31, 0.25, 0.37), "dpo": (0.02, -0.02, 0.06), "ppo": (0.23, 0.17, 0.29)}


def manifest(stage: str) -> dict:
    """What `data.manifest` writes of a mixture of two sources."""
    numbers = {"rows": 300, "tried": 300, "kept": 288, "truncated": 2, "repeated": 0, "used": 288}
    source = {**numbers, "left_out": {"too long": 12}, "tokens": 20500, "trained_tokens": 9300}
    totals = {**{key: 2 * value for key, value in numbers.items()}, "left_out": 24}
    return {
        "digest": f"{stage:0<64}",
        "settings": {"seed": 1, "template": "tulu", "tokenizer_digest": "ab" * 32},
        "totals": {**totals, "tokens": 41000, "trained_tokens": 18600},
        "sources": {"additions": source, HOSTILE: source},
    }


def origin(stage: str) -> dict:
    """What a stage of a recipe has set over its files."""
    return {
        "files": ["configs/base.yaml", f"configs/{stage}_smol.yaml"],
        "files_say": {"seed": 0, "model": {"lr": 1e-5}},
        "command_line": {"seed": 1, "model": {"beta": 0.05, "lr": 1e-5}},
    }


def write_run(root: Path) -> Path:
    """A finished run under `root`."""
    rng = random.Random(0)
    versions = {"tulu_lightning": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "python": "3.11.7"}
    recipe = {"name": "smol", "created": "2026-11-23T21:17:04+00:00", "stages": ["sft", "pairs", "dpo", "ppo"]}
    recipe |= {"versions": versions, "seeds": {"seed": 1}, "command": "tulu recipe --config configs/recipes/smol.yaml"}
    dump(root / "recipe.json", recipe)
    for stage, steps in STEPS.items():
        folder = root / stage
        dump_lines(folder / "metrics.jsonl", [ROWS[stage](step, rng) for step in range(steps)])
        (folder / "config.yaml").write_text(f"stage: {stage}\nseed: 1\nmodel:\n  lr: 1.0e-05\n  beta: 0.05\n")
        for when, accuracy, tokens in zip(("before", "after"), ACCURACY[stage], TOKENS[stage], strict=True):
            scores(accuracy, tokens=tokens).to_json(folder / "scores" / f"{when}.json")
        first, last = ACCURACY[stage]
        for step in range(10, steps, 10):
            scores(first + (last - first) * step / steps, tokens=TOKENS[stage][1]).to_json(
                folder / "scores" / f"step_{step:06d}.json"
            )
        dump(folder / "data_manifest.json", manifest(stage))
        dump(folder / "config_origin.json", origin(stage))
        difference, low, high = GAIN[stage]
        reason = (
            "the lower end of the paired interval is above -1 point" if stage != "dpo" else "no clear loss [-2, +6]"
        )
        decision = {"promote": True, "reason": reason, "difference": difference, "low": low, "high": high}
        summary = {"stage": stage, "steps": steps, "seconds": 512.3, "tokens": 123456, "peak_memory_bytes": 3.4e9}
        start = {"sft": "assets/smollm2-135m-instruct", "dpo": "runs/smol/sft/final", "ppo": "runs/smol/dpo/final"}
        dump(folder / "summary.json", {**summary, "start": start[stage], "promoted": True, "decision": decision})
    held_out = [
        {"step": step, "val_loss": 0.69 - 0.004 * step, "val_accuracy": 0.5 + 0.008 * step, "val_margin": 0.02 * step}
        for step in range(10, STEPS["dpo"] + 1, 10)
    ]
    dump_lines(root / "dpo" / "validation.jsonl", held_out)
    dump_lines(root / "ppo" / "rollouts.jsonl", rollouts(STEPS["ppo"], rng))
    lengths = {"pairs": 212, "chosen": 3.25, "rejected": 5.5, "chosen_longer": 0.125, "rejected_longer": 0.5}
    pairs = {"stage": "pairs", "prompts": 300, "samples": 1200, "pairs": 212, "seconds": 95.0, "tokens": 5100}
    pairs["lengths"] = lengths
    dump(root / "pairs" / "summary.json", {**pairs, "peak_memory_bytes": 1.1e9})
    (root / "pairs" / "config.yaml").write_text("samples_per_prompt: 4\ntemperature: 1.0\n")
    return root
