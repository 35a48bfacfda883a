"""RLVR against TRL's GRPOTrainer: the same model, prompts, group size, response length and reward, whole steps, in turn.

    python benchmarks/rlvr.py --dtype bfloat16 float32        # sweep TRL's settings, then rounds; a JSON line a case
    python benchmarks/rlvr.py --quick                         # some minutes

Two kinds of prompts: a sum asked in a sentence (some 50 tokens with the template), and the same after worked examples, as
the paper asks grade-school maths (some 500 tokens). A step samples a group of responses to each prompt, gives half of
them a reward (`peers/coin.py`), and makes one update of GRPO (no KL, clipped at 0.2, fused AdamW on fp32 weights);
`bfloat16` means autocast. Every response has the same length on both sides (the stop token is not listened to), so the
work is the same although samples differ. A step is timed from the end of the one before to its own end; the first is
not counted. Every run is a process of its own.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import machine, run_worker
from transformers.utils import logging as transformers_logging
from turns import Setting, median, memory_of, ratios, say, sweep

from tulu_lightning.assets.arithmetic import prompt_rows
from tulu_lightning.assets.models import resolve_model

PEERS = Path(__file__).parent / "peers"
MODEL = "smollm2-135m-instruct"
EXAMPLES = 20
"""Worked sums before the question of a few-shot prompt."""
KEPT = ("rate", "cpu_rate", "seconds_a_step")


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    """Prompts of a kind, with ground truth."""
    rows = prompt_rows(count)
    return rows if kind == "short" else [few_shot(row, number) for number, row in enumerate(rows)]


def few_shot(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The question after worked examples, all in one user message, as in the paper's prompts."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(EXAMPLES)]
    blocks = [f"Question: What is {a} + {b}?\nAnswer: {a} plus {b} makes {a + b}." for a, b in pairs]
    blocks.append(f"Question: {row['messages'][-1]['content']}\nAnswer:")
    return {**row, "messages": [{"role": "user", "content": "\n\n".join(blocks)}]}


def trl_settings(responses: int, quick: bool) -> list[Setting]:
    """Sizes of TRL's micro-batches; and bf16 weights for the table, whose small updates are lost."""
    sizes = [size for size in ((16, 64) if quick else (8, 16, 32, 64)) if responses % size == 0]
    found = [Setting(f"batch {size}", {"batch": size, "accumulate": responses // size}) for size in sizes]
    if quick:
        return found
    low = {"batch": sizes[-1], "accumulate": responses // sizes[-1], "weights": "bfloat16"}
    return [*found, Setting(f"bf16 weights, batch {sizes[-1]}", low, same=False)]


def our_settings(quick: bool) -> list[Setting]:
    """Sizes of our micro-batches."""
    return [Setting(f"micro_tokens {size}", {"micro_tokens": size}) for size in ((4096,) if quick else (2048, 4096))]


class Bench:
    """The job of one case (kind of prompts, dtype); runs one side once."""

    def __init__(self, options: argparse.Namespace, kind: str, dtype: str, folder: Path) -> None:
        self.options, self.kind, self.dtype, self.folder = options, kind, dtype, folder
        self.model, self.gpu = str(resolve_model(options.model)), torch.cuda.is_available()

    def run(self, side: str, setting: Setting, steps: int) -> dict[str, Any]:
        """Train `steps` steps after the first; adds the rates to what the worker measured."""
        options = self.options
        path = self.folder / f"{self.kind}.jsonl"
        rows = rows_of(self.kind, options.prompts * (steps + 1))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = {
            "rows": str(path),
            "model": self.model,
            "template": "smollm2",
            "dtype": self.dtype,
            "accelerator": "cuda" if self.gpu else "cpu",
            "prompts_per_step": options.prompts,
            "group": options.group,
            "new_tokens": options.new_tokens,
            "forced": True,
            "warmup": 1,
            "steps": steps,
            "lr": 1e-5,
            "folder": str(self.folder / "trl"),
            "settings": setting.settings,
        }
        worker = "trl_grpo.py" if side == "trl" else "ours_grpo.py"
        result = run_worker(PEERS / worker, job)
        trained, seconds = sum(result["trained"][1:]), sum(result["seconds"])
        expected = options.prompts * options.group * options.new_tokens * steps
        if trained != expected:
            raise SystemExit(f"{side} trained {trained} response tokens, not {expected}")
        result |= {"rate": trained / seconds, "cpu_rate": trained / sum(result["cpu_seconds"])}
        result["seconds_a_step"] = seconds / steps
        phases = {name: sum(step[name] for step in result["phases"][1:]) / steps for name in result["phases"][0]}
        result["phase_seconds"] = {name: round(value, 3) for name, value in phases.items()}
        say(
            f"{self.kind} {self.dtype} {side:5} {setting.name:24} {result['rate']:7.1f} response tokens/s "
            f"{result['seconds_a_step']:6.2f} s a step {result['phase_seconds']} {memory_of(result) / 1e9:5.2f} GB"
        )
        return result


def compare(bench: Bench, sides: dict[str, Setting]) -> dict[str, Any]:
    """Both sides in turn, the first one changing from round to round."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(bench.options.rounds):
        order = list(sides.items())
        for side, setting in order if number % 2 == 0 else order[::-1]:
            results[side].append(bench.run(side, setting, bench.options.steps))
    summary = {
        side: {
            "response_tokens_per_second": round(median(runs, "rate"), 1),
            "response_tokens_per_cpu_second": round(median(runs, "cpu_rate"), 1),
            "seconds_a_step": round(median(runs, "seconds_a_step"), 3),
            "phase_seconds": [run["phase_seconds"] for run in runs],
            "peak_bytes": max(memory_of(run) for run in runs),
            "computed_tokens": runs[0]["computed"],
            "rewards": runs[0]["rewards"],
            "setting": asdict(sides[side]),
        }
        for side, runs in results.items()
    }
    return {
        **summary,
        "ratio": ratios(results["ours"], results["trl"]),
        "cpu_ratio": ratios(results["ours"], results["trl"], "cpu_rate"),
        "memory_ratio": round(summary["ours"]["peak_bytes"] / summary["trl"]["peak_bytes"], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a folder (`shapes.py` makes some)")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--kind", nargs="+", choices=("short", "few_shot"), default=["short", "few_shot"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts of one step")
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every response")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of one run, after the first")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--trl", type=json.loads, help="TRL's settings as JSON, in place of the sweep")
    parser.add_argument("--ours", type=json.loads, help="ours, likewise")
    parser.add_argument("--quick", action="store_true", help="fewer settings, 2 rounds of 1 step")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 1
    transformers_logging.set_verbosity_error()
    place, responses = machine(), options.prompts * options.group
    for kind, dtype in ((kind, dtype) for kind in options.kind for dtype in options.dtype):
        with tempfile.TemporaryDirectory() as folder:
            bench, sides, table = Bench(options, kind, dtype, Path(folder)), {}, []
            for side, given, settings in (
                ("trl", options.trl, trl_settings(responses, options.quick)),
                ("ours", options.ours, our_settings(options.quick)),
            ):
                sides[side] = Setting("as given", given or {})
                if given is None:
                    sides[side], rows = sweep(bench.run, side, settings, 1, "rate", KEPT)
                    table += rows
            case = {"benchmark": "rlvr", "prompts": kind, "dtype": dtype, "model": options.model}
            case |= {name: getattr(options, name) for name in ("group", "new_tokens", "steps", "rounds")}
            case |= {"prompts_per_step": options.prompts}
            case |= compare(bench, sides) | {"command": " ".join(["python", "benchmarks/rlvr.py", *sys.argv[1:]])}
            print(json.dumps(case | place | {"sweep": table}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
