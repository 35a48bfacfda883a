"""DPO against TRL's DPOTrainer: the same pairs, model, dtype, loss and optimiser, whole optimiser steps, in turn.

    python benchmarks/dpo.py --dtype float32 bfloat16         # sweep TRL's settings, then rounds; a JSON line a case
    python benchmarks/dpo.py --quick                          # some minutes
    python benchmarks/dpo.py --sweep                          # only the table of settings, of both sides

Two kinds of real pairs (`preference_pairs.py`): whole conversations of up to 2048 tokens, and short ones whose prompt is
some fifteen tokens, so that sharing it is worth little. Three sides: ours; ours with every prompt computed twice
(`unshared`); TRL at the fastest of its settings. A step is timed from the end of the one before to its own end: batch,
forward, backward, clipping, update; the first is not counted. The reference's log-probs are computed before the first
step on every side, and timed apart. Every run is a process of its own. All train the last answers and their end tokens
with the length-normalised loss (β = 5), clip at 1, and use fused AdamW on fp32 weights; `bfloat16` means autocast.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import Shape, machine, run_worker
from preference_pairs import about, read_pairs, write_rows
from transformers.utils import logging as transformers_logging
from turns import Setting, in_turns, median, memory_of, ratios, say, sweep

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.core.step_plan import StepPlan

PEERS = Path(__file__).parent / "peers"
MODEL, SEED, BETA = "smollm2-135m-instruct", 0, 5.0
AGREE = {"float32": ((1e-4, 1e-3), (1e-3, 1e-2)), "bfloat16": ((2e-2, 5e-2), (2e-1, 5e-1))}
"""Largest differences between ours and TRL's in the first step and the second: of the losses (absolute; the first is log
2), and of the gradient norms (relative). Rounding, not another computation: an answer of two tokens under β = 5 makes
much of bf16's, and Adam's first update turns a gradient near 0 into a whole step either way."""
KEPT = ("rate", "token_rate", "cpu_rate", "reference_rate")
FORMULA = (
    "6 x weights of the decoder's matrices x tokens (a pair's prompt once), + 6 x vocabulary x width x trained tokens, "
    "+ 12 x layers x heads x head width x query-key pairs that may see each other, prompts once: the same for all sides"
)


def trl_settings(rows: int, gpu: bool, quick: bool) -> list[Setting]:
    """What to try. `padding_free` falls back to padding in this version of TRL, with a warning."""
    sizes = (4, 8, 16) if gpu else (1, 2, 4) if quick else (1, 2, 4, 8)
    batches = [batch for batch in sizes if batch <= rows]

    def setting(name: str, batch: int, same: bool = True, **more: Any) -> Setting:
        return Setting(name, {"batch": batch, "accumulate": rows // batch, **more}, same)

    found = [setting(f"batch {batch}", batch) for batch in batches]
    if gpu:
        return found + [setting(f"batch {batch}, liger", batch, liger=True) for batch in batches]
    # Not settings but a patch; for the table, and named so.
    found += [setting("patched: head of scored tokens only, batch 1", 1, False, head="scored")]
    return found if quick else [*found, setting("checkpointing, batch 1", 1, False, checkpointing=True)]


def our_settings(quick: bool, gpu: bool = False) -> list[Setting]:
    """Sizes of our micro-batches; on a GPU compiled ones, too, padded to one shape."""
    if gpu:
        found = [Setting(f"micro_tokens {size}", {"data": {"micro_tokens": size}}) for size in (8192, 16384)]
        data = {"micro_tokens": 8192, "pad_to": 8192}
        return [*found, Setting("micro_tokens 8192, compiled", {"data": data, "backbone": {"compile": True}})]
    sizes = (512, 2048) if quick else (512, 1024, 2048, 4096)
    return [Setting(f"micro_tokens {size}", {"data": {"micro_tokens": size}}) for size in sizes]


def unshared(setting: Setting) -> Setting:
    """A setting of ours with every prompt computed twice."""
    data = {**setting.settings.get("data", {}), "share_prefix": False}
    return Setting(f"{setting.name}, prompts twice", {**setting.settings, "data": data})


class Bench:
    """The pairs and the job of one case (kind of pairs, dtype); runs one side once."""

    def __init__(self, options: argparse.Namespace, kind: str, dtype: str, folder: Path) -> None:
        self.options, self.kind, self.dtype, self.folder = options, kind, dtype, folder
        self.gpu = torch.cuda.is_available()
        self.model = str(resolve_model(options.model))
        pairs = read_pairs(kind, load_tokenizer(self.model), options.max_tokens)
        wanted = (options.steps + 1) * options.rows
        if wanted > len(pairs):
            raise SystemExit(f"{wanted} pairs are needed, {len(pairs)} are there: lower --steps or --rows")
        self.pairs, self.all = pairs[:wanted], pairs

    def steps(self, count: int) -> list[list[int]]:
        """Rows of each step, as our plan has them; in each the longest first, so that TRL's batches pad little."""
        plan = StepPlan(
            lengths=[1] * (count * self.options.rows), examples_per_step=self.options.rows, micro_tokens=1, seed=SEED
        )
        return [sorted(plan.examples(step), key=lambda row: -self.pairs[row].longest) for step in range(count)]

    def sample(self) -> dict[str, Any]:
        """What the timed pairs are like beside all of them: a few may share or score far more than most do."""
        timed = [self.pairs[row] for rows in self.steps(self.options.steps + 1)[1:] for row in rows]
        return {"timed": about(timed), "all": about(self.all)}

    def run(self, side: str, setting: Setting, steps: int) -> dict[str, Any]:
        """Train `steps` steps after the first; adds the rates to what the worker measured."""
        return self.rated(
            side, setting, steps, self._work(side, steps, self.job(self._file(side, steps), setting, steps))
        )

    def run_all(self, side: str, settings: Sequence[Setting], steps: int) -> list[dict[str, Any]]:
        """The same of several settings, in one process."""
        tasks = [self.job(self._file(side, steps), setting, steps) for setting in settings]
        results = self._work(side, steps, tasks)
        return [self.rated(side, setting, steps, found) for setting, found in zip(settings, results, strict=True)]

    def _file(self, side: str, steps: int) -> Path:
        plan = self.steps(steps + 1)
        order = [row for rows in plan for row in rows] if side == "trl" else range(len(plan) * self.options.rows)
        path = self.folder / f"{side}-{steps}.jsonl"
        write_rows(path, [self.pairs[row] for row in order])
        return path

    @staticmethod
    def _work(side: str, steps: int, job: Any) -> Any:
        with tempfile.TemporaryDirectory() as cache:  # a reference of an earlier run must not be found
            return run_worker(PEERS / ("trl_dpo.py" if side == "trl" else "ours_dpo.py"), job, Path(cache))

    def rated(self, side: str, setting: Setting, steps: int, result: dict[str, Any]) -> dict[str, Any]:
        """With its rates, which are told."""
        if "failed" in result:
            say(f"{self.kind} {self.dtype} {side:8} {setting.name:34} {result['failed']}")
            return result
        plan = self.steps(steps + 1)
        result["tokens"] = [sum(self.pairs[row].tokens for row in rows) for rows in plan]
        seconds, pairs = sum(result["seconds"]), steps * self.options.rows
        result["rate"], result["cpu_rate"] = pairs / seconds, pairs / sum(result["cpu_seconds"])
        result["token_rate"] = sum(result["tokens"][1:]) / seconds
        result["reference_rate"] = result["reference_pairs"] / result["reference_seconds"]
        computed = sum(result["computed"]) / sum(result["tokens"])
        say(
            f"{self.kind} {self.dtype} {side:8} {setting.name:34} {result['rate']:6.3f} pairs/s "
            f"{result['token_rate']:7.0f} tokens/s  {result['cpu_rate']:6.3f} pairs a CPU second  computed {computed:4.0%}"
            f"  reference {result['reference_rate']:6.3f} pairs/s  {memory_of(result) / 1e9:5.2f} GB"
        )
        return result

    def job(self, rows: Path, setting: Setting, steps: int) -> dict[str, Any]:
        """What a worker is told."""
        return {
            "rows": str(rows),
            "model": self.model,
            "template": "smollm2",
            "dtype": self.dtype,
            "accelerator": "cuda" if self.gpu else "cpu",
            "max_tokens": self.options.max_tokens,
            "pairs_per_step": self.options.rows,
            "warmup": 1,
            "steps": steps,
            "lr": 1e-5,
            "beta": BETA,
            "seed": SEED,
            "folder": str(self.folder / "trl"),
            "settings": setting.settings,
        }

    def sweep(self, side: str, settings: list[Setting]) -> tuple[Setting, list[dict[str, Any]]]:
        """Each setting for a step; the fastest, and the table."""
        rate = "cpu_rate" if self.options.by_cpu else "rate"
        together = self.run_all if self.gpu else None
        return sweep(self.run, side, settings, self.options.sweep_steps, rate, KEPT, together)


def check_same(bench: Bench, ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of both sides; stops when they are those of another computation."""
    found: dict[str, Any] = {
        f"{side}_{key}": [round(value, 6) for value in result[key]]
        for side, result in (("ours", ours), ("trl", trl))
        for key in ("losses", "grad_norms")
    }
    found["loss_differences"] = [abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)]
    norms = zip(ours["grad_norms"], trl["grad_norms"], strict=True)
    found["relative_grad_norm_differences"] = [abs(a - b) / b for a, b in norms]
    found["first_loss_minus_log_2"] = {"ours": ours["losses"][0] - math.log(2), "trl": trl["losses"][0] - math.log(2)}
    differences = zip(found["loss_differences"], found["relative_grad_norm_differences"], strict=True)
    wrong = [
        step
        for step, (found_pair, most) in enumerate(zip(differences, AGREE[bench.dtype], strict=False))
        if found_pair[0] > most[0] or found_pair[1] > most[1]
    ]
    if wrong or ours["scored"] != trl["trained"]:
        raise SystemExit(f"not the same: scored {ours['scored']} and {trl['trained']} tokens, {found}")
    return found


def compare(bench: Bench, ours: Setting, trl: Setting) -> dict[str, Any]:
    """All sides in turn, the first one changing from round to round."""
    shape, options = Shape.of(bench.model), bench.options
    sides = {"ours": ours, "trl": trl, "unshared": unshared(ours)}
    results, peak = in_turns(bench.run, sides, options.rounds, options.steps, bench.dtype, shape)
    first = results["ours"][0]
    same = check_same(bench, first, results["trl"][0])
    needed = shape.flops(*(sum(first[key][1:]) for key in ("computed", "trained", "visible")))
    per_pair = needed / (options.steps * options.rows)
    summary: dict[str, Any] = {}
    for side, runs in results.items():
        rate = median(runs, "rate")
        summary[side] = {
            "pairs_per_second": round(rate, 4),
            "tokens_per_second": round(median(runs, "token_rate"), 1),
            "pairs_per_cpu_second": round(median(runs, "cpu_rate"), 4),
            "reference_pairs_per_second": round(median(runs, "reference_rate"), 4),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "device_peak_bytes": max(run.get("device_peak_bytes", 0) for run in runs),
            "computed_tokens": runs[0]["computed"],
            "share_of_matmul_peak": round(rate * per_pair / peak["flops"], 3),
            "setting": asdict(sides[side]),
        }
    memory = "device_peak_bytes" if bench.gpu else "peak_bytes"
    return {
        **summary,
        "ratio": ratios(results["ours"], results["trl"]),
        "cpu_ratio": ratios(results["ours"], results["trl"], "cpu_rate"),
        "reference_ratio": ratios(results["ours"], results["trl"], "reference_rate"),
        "memory_ratio": round(summary["ours"][memory] / summary["trl"][memory], 3),
        "sharing": {key: ratios(results["ours"], results["unshared"], key) for key in ("rate", "cpu_rate")},
        "same": same,
        "sample": bench.sample(),
        "tokens": first["tokens"],
        "trained": first["trained"],
        "matmul_peak": peak,
        "flops_formula": FORMULA,
        "flops_per_pair": round(per_pair),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a folder (`shapes.py` makes some)")
    parser.add_argument("--dtype", nargs="+", choices=tuple(AGREE), default=["float32"], help="of the matrix products")
    parser.add_argument("--pairs", nargs="+", choices=("real", "short"), default=["real", "short"])
    parser.add_argument("--rows", type=int, default=8, help="pairs of one optimiser step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of one run, after the first")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a conversation; longer pairs are left out")
    parser.add_argument("--sweep-steps", type=int, default=1, help="timed steps of one run of the sweep")
    parser.add_argument("--by-cpu", action="store_true", help="choose settings by CPU time (the machine is shared)")
    parser.add_argument("--trl", type=json.loads, help="TRL's settings as JSON, in place of the sweep")
    parser.add_argument("--ours", type=json.loads, help="ours, likewise")
    parser.add_argument("--sweep", action="store_true", help="the sweep alone")
    parser.add_argument("--quick", action="store_true", help="fewer settings, 2 rounds of 1 step")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 1
    options.steps = max(options.steps, options.sweep_steps)
    transformers_logging.set_verbosity_error()
    place = machine()
    for kind, dtype in ((kind, dtype) for kind in options.pairs for dtype in options.dtype):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options, kind, dtype, Path(folder))
            trl, table = Setting("as given", options.trl or {}), []
            if options.trl is None:
                trl, table = bench.sweep("trl", trl_settings(options.rows, bench.gpu, options.quick))
            ours = Setting("as given", options.ours or {})
            if options.ours is None:
                ours, more = bench.sweep("ours", our_settings(options.quick, bench.gpu))
                table += more
            result: dict[str, Any] = {
                "benchmark": "dpo",
                "pairs": kind,
                "dtype": dtype,
                "model": options.model,
                "beta": BETA,
            }
            result |= {"pairs_per_step": options.rows, "max_tokens": options.max_tokens, "steps": options.steps}
            if not options.sweep:
                result |= compare(bench, ours, trl)
            result |= {"command": " ".join(["python", "benchmarks/dpo.py", *sys.argv[1:]])}
            print(json.dumps(result | place | {"sweep": table}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
