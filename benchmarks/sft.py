"""SFT against TRL's SFTTrainer: the same rows, model, dtype, loss and optimiser, whole optimiser steps, in turn.

    python benchmarks/sft.py --dtype float32 bfloat16        # sweep TRL's settings, then pairs; a JSON line a dtype
    python benchmarks/sft.py --quick                         # a few minutes
    python benchmarks/sft.py --sweep                         # only the table of settings, of both sides

The rows are real chat rows (`alpaca_en_demo`, all lengths). A step is timed from the end of the one before to its own
end: batch, forward, backward, clipping, update. The first step is not counted. Every run is a process of its own. Both
sides train the answers and their end tokens, divide by the step's trained tokens, clip at 1, and use fused AdamW on fp32
weights; `bfloat16` means autocast on both. TRL runs with the best of its settings that compute the same thing. The table
shows the others too: `cross` attends across rows, `bf16 weights` has no fp32 weights to update.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import FORMULA, Shape, machine, run_worker
from transformers.utils import logging as transformers_logging
from turns import Setting, in_turns, median, memory_of, ratios, say, spread, sweep

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.assets.rows import alpaca_rows
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data.chat import chat_template, encode
from tulu_lightning.data.templates import SMOLLM2_SYSTEM

PEERS = Path(__file__).parent / "peers"
MODEL, TEMPLATE, SEED = "smollm2-135m-instruct", "smollm2", 0
AGREE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference of the two first-step losses: rounding, not another computation."""


def trl_settings(rows: int, length: int, mean: float, dtype: str, quick: bool) -> list[Setting]:
    """What to try: padded (a step's rows by length, so that neighbours pad little), padding-free, packed."""

    def setting(name: str, batch: int, same: bool = True, same_steps: bool = True, **more: Any) -> Setting:
        return Setting(name, {"batch": batch, "accumulate": max(1, rows // batch), **more}, same, same_steps)

    batches = [batch for batch in ((2, 4) if quick else (1, 2, 4, 8)) if batch <= rows]
    found = [setting(f"padded, batch {batch}", batch, loss=loss) for batch in batches for loss in ("plain", "fused")]
    found += [setting("padding-free, batch 2", 2, loss="plain", padding_free=True)]
    if quick:
        return found
    found += [setting(f"padding-free, batch {batch}", batch, loss="plain", padding_free=True) for batch in (4, 8)]
    found += [
        setting("padded, batch 4, group_by_length", 4, True, False, loss="plain", sampling="group_by_length"),
    ]
    for strategy in ("bfd", "wrapped"):  # bfd: as many packs a step as hold about as many rows
        for size in (length, 2 * length):
            packs, exact = max(1, round(rows * mean / size)), strategy == "bfd"
            more = {"accumulate": packs, "packing": strategy, "length": size, "loss": "plain"}
            found.append(Setting(f"packed {strategy} {size}", {"batch": 1, **more}, exact, False))
    if dtype == "bfloat16":
        found.append(setting("bf16 weights, padded, batch 4", 4, False, loss="plain", weights="bfloat16"))
    return found


def trl_gpu_settings(rows: int, mean: float) -> list[Setting]:
    """What to try on a GPU; liger's last, as it stays in the process."""
    found = []
    for liger in (False, True):
        name, more = (", liger", {"liger": True}) if liger else ("", {})
        for batch in (16, 32):
            common = {"batch": batch, "accumulate": rows // batch, **more}
            for loss in () if liger else ("plain", "fused"):
                found.append(Setting(f"padded, batch {batch}, {loss}", {**common, "loss": loss}))
            if liger:
                found.append(Setting(f"padded, batch {batch}{name}", common))
            flat = {**common, "padding_free": True, "attention": "flex_attention"}
            found.append(Setting(f"padding-free, flex, batch {batch}{name}", flat))
        packs = max(1, round(rows * mean / 8192))
        packed = {"batch": 1, "accumulate": packs, "packing": "bfd", "length": 8192, "attention": "flex_attention"}
        found.append(Setting(f"packed bfd 8192, flex{name}", {**packed, **more}, True, False))
    return found


def our_gpu_settings() -> list[Setting]:
    """Sizes of micro-batches, as they come and compiled, padded to one shape."""
    found = [Setting(f"micro_tokens {size}", {"data": {"micro_tokens": size}}) for size in (8192, 16384)]
    for size in (8192, 16384):
        data = {"micro_tokens": size, "pad_to": size}
        found.append(Setting(f"micro_tokens {size}, compiled", {"data": data, "backbone": {"compile": True}}))
    return found


def our_settings(quick: bool) -> list[Setting]:
    """Sizes of our micro-batches."""
    sizes = (2048, 4096) if quick else (1024, 2048, 4096, 8192)
    return [Setting(f"micro_tokens {size}", {"data": {"micro_tokens": size}}) for size in sizes]


class Bench:
    """The rows and the job of one dtype; runs one side once."""

    def __init__(self, options: argparse.Namespace, dtype: str, folder: Path) -> None:
        self.options, self.dtype, self.folder = options, dtype, folder
        self.gpu = torch.cuda.is_available()
        self.model = str(resolve_model(options.model))
        rows = self._rows(options.steps + 1)
        tokenizer = load_tokenizer(self.model)
        template = chat_template(TEMPLATE, tokenizer)
        self.lengths = [len(encode(tokenizer, template, row["messages"])[0]) for row in rows]
        if max(self.lengths) > options.max_tokens:
            raise SystemExit(f"a row has {max(self.lengths)} tokens: raise --max-tokens, rows must not be cut")

    def _rows(self, steps: int) -> list[dict[str, Any]]:
        return alpaca_rows(limit=steps * self.options.rows, max_chars=10**7)

    def files(self, steps: int) -> tuple[Path, Path]:
        """Rows as we read them, and the same in the order of our steps, each step's longest first, for TRL."""
        rows, each = self._rows(steps), self.options.rows
        plan = StepPlan(lengths=[1] * len(rows), examples_per_step=each, micro_tokens=1, seed=SEED)
        order = [
            row for step in range(steps) for row in sorted(plan.examples(step), key=lambda row: -self.lengths[row])
        ]
        paths = self.folder / f"ours-{steps}.jsonl", self.folder / f"trl-{steps}.jsonl"
        for path, chosen in zip(paths, (range(len(rows)), order), strict=True):
            path.write_text("".join(json.dumps(rows[row]) + "\n" for row in chosen))
        return paths

    def run(self, side: str, setting: Setting, steps: int) -> dict[str, Any]:
        """Train `steps` steps after the first; adds the rates to what the worker measured."""
        ours, ordered = self.files(steps + 1)
        job = self.job(ours if side == "ours" else ordered, setting, steps)
        return self.rated(side, setting, run_worker(PEERS / f"{side}_sft.py", job))

    def run_all(self, side: str, settings: Sequence[Setting], steps: int) -> list[dict[str, Any]]:
        """The same of several settings, in one process."""
        ours, ordered = self.files(steps + 1)
        tasks = [self.job(ours if side == "ours" else ordered, setting, steps) for setting in settings]
        results = run_worker(PEERS / f"{side}_sft.py", tasks)
        return [self.rated(side, *pair) for pair in zip(settings, results, strict=True)]

    def rated(self, side: str, setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
        """With its rates, which are told."""
        if "failed" in result:
            say(f"{self.dtype} {side:4} {setting.name:45} {result['failed']}")
            return result
        seconds, cpu = sum(result["seconds"]), sum(result["cpu_seconds"])
        result["rate"] = sum(result["tokens"][1:]) / seconds
        result["trained_rate"] = sum(result["trained"][1:]) / seconds
        result["cpu_rate"] = sum(result["tokens"][1:]) / cpu
        padding = 1 - sum(result["tokens"]) / sum(result["computed"])
        say(
            f"{self.dtype} {side:4} {setting.name:45} {result['rate']:7.0f} tokens/s  "
            f"{result['cpu_rate']:6.0f} a CPU second  {padding:4.0%} padding  {memory_of(result) / 1e9:5.2f} GB"
        )
        return result

    def job(self, rows: Path, setting: Setting, steps: int) -> dict[str, Any]:
        """What a worker is told."""
        return {
            "rows": str(rows),
            "model": self.model,
            "template": TEMPLATE,
            "system": SMOLLM2_SYSTEM,
            "dtype": self.dtype,
            "accelerator": "cuda" if self.gpu else "cpu",
            "max_tokens": self.options.max_tokens,
            "rows_per_step": self.options.rows,
            "warmup": 1,
            "steps": steps,
            "lr": 1e-5,
            "seed": SEED,
            "folder": str(self.folder / "trl"),
            "settings": setting.settings,
        }

    def prepare(self, side: str, setting: Setting, copies: int = 4) -> float:
        """Rows a second from chat rows in a file to whole steps of token ids (tokenise, mask, pack), nothing cached."""
        every = alpaca_rows(limit=999, max_chars=10**7) * copies
        path = self.folder / "every.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in every))
        with tempfile.TemporaryDirectory() as cache:
            result = run_worker(PEERS / f"{side}_sft.py", self.job(path, setting, 0), Path(cache))
        rate = len(every) / result["prepare_seconds"]
        say(f"{side:4} {setting.name:45} {rate:7.0f} rows/s prepared")
        return rate

    def sweep(self, side: str, settings: Sequence[Setting]) -> tuple[Setting, list[dict[str, Any]]]:
        """Each setting for a step or two; the fastest that computes the same thing, and the table."""
        rate = "cpu_rate" if self.options.by_cpu else "rate"
        kept, together = ("rate", "trained_rate", "cpu_rate"), self.run_all if self.gpu else None
        return sweep(self.run, side, settings, self.options.sweep_steps, rate, kept, together)


def check_first_loss(bench: Bench, ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, float]:
    """The two first-step losses and gradient norms; stops when they are those of another computation."""
    found = {"ours": ours["losses"][0], "trl": trl["losses"][0]}
    found |= {"ours_grad_norm": ours["grad_norms"][0], "trl_grad_norm": trl["grad_norms"][0]}
    found["difference"] = abs(found["ours"] - found["trl"]) / found["ours"]
    same_tokens = ours["tokens"] == trl["tokens"] and ours["trained"] == trl["trained"]
    if not same_tokens or found["difference"] > AGREE[bench.dtype]:
        counts = f"tokens {ours['tokens']} and {trl['tokens']}, trained {ours['trained']} and {trl['trained']}"
        raise SystemExit(f"the two sides do not compute the same: {counts}, first losses {found}")
    return {key: round(value, 6) for key, value in found.items()}


def pairs(bench: Bench, ours: Setting, trl: Setting) -> dict[str, Any]:
    """Both sides in turn, the first one changing from round to round."""
    shape, options = Shape.of(bench.model), bench.options
    sides = {"ours": ours, "trl": trl}
    results, peak = in_turns(bench.run, sides, options.rounds, options.steps, bench.dtype, shape)
    first = results["ours"][0]
    if trl.same_steps:
        loss = check_first_loss(bench, first, results["trl"][0])
    else:
        other = Setting("padded, batch 1, for the check", {"batch": 1, "accumulate": bench.options.rows})
        loss = check_first_loss(bench, first, bench.run("trl", other, options.steps))
    per_token = shape.flops(*(sum(first[key][1:]) for key in ("tokens", "trained", "visible")))
    per_token /= sum(first["tokens"][1:])
    summary: dict[str, Any] = {}
    for side, setting in sides.items():
        rate = median(results[side], "rate")
        summary[side] = {
            "tokens_per_second": round(rate, 1),
            "trained_tokens_per_second": round(median(results[side], "trained_rate"), 1),
            "tokens_per_cpu_second": round(median(results[side], "cpu_rate"), 1),
            "peak_bytes": max(memory_of(result) for result in results[side]),
            "share_of_matmul_peak": round(rate * per_token / peak["flops"], 3),
            "share_of_mm_peak": round(rate * per_token / peak["mm_flops"], 3),
            "setting": asdict(setting),
        }
    return {
        **summary,
        "ratio": ratios(results["ours"], results["trl"]),
        "cpu_ratio": ratios(results["ours"], results["trl"], "cpu_rate"),
        "memory_ratio": round(summary["ours"]["peak_bytes"] / summary["trl"]["peak_bytes"], 3),
        "first_loss": loss,
        "tokens": first["tokens"],
        "trained": first["trained"],
        "matmul_peak": peak,
        "flops_formula": FORMULA,
        "flops_per_token": round(per_token),
    }


def prepare(bench: Bench) -> dict[str, Any]:
    """Data preparation of both sides in turn; TRL's with packing, in one process and in as many as there are cores."""
    rates: dict[str, list[float]] = {"ours": [], "trl": []}
    for _ in range(min(3, bench.options.rounds)):
        rates["ours"].append(bench.prepare("ours", Setting("prepare", {})))
        peers = [
            {"batch": 1, "accumulate": 1, "packing": "bfd", "processes": count} for count in (None, os.cpu_count())
        ]
        rates["trl"].append(
            max(bench.prepare("trl", Setting(f"prepare, processes {peer['processes']}", peer)) for peer in peers)
        )
    return {
        "rows_per_second": {side: round(statistics.median(found)) for side, found in rates.items()},
        "ratio": spread([a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a folder (`shapes.py` makes some)")
    parser.add_argument("--dtype", nargs="+", choices=tuple(AGREE), default=["float32"], help="of the matrix products")
    parser.add_argument("--rows", type=int, default=16, help="rows of one optimiser step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of one run, after the first")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--sweep-steps", type=int, default=1, help="timed steps of one run of the sweep")
    parser.add_argument(
        "--by-cpu", action="store_true", help="choose settings by CPU time, where others use the machine"
    )
    parser.add_argument("--trl", type=json.loads, help="TRL's settings as JSON, in place of the sweep")
    parser.add_argument("--ours", type=json.loads, help="ours, likewise")
    parser.add_argument("--sweep", action="store_true", help="the sweep alone")
    parser.add_argument("--quick", action="store_true", help="fewer settings, 2 pairs of 2 steps")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 2
    transformers_logging.set_verbosity_error()
    about = machine()
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options, dtype, Path(folder))
            mean = sum(bench.lengths) / len(bench.lengths)
            tried = trl_settings(options.rows, options.max_tokens, mean, dtype, options.quick)
            if bench.gpu:
                tried = trl_gpu_settings(options.rows, mean)
            trl, table = (
                (Setting("as given", options.trl), []) if options.trl is not None else bench.sweep("trl", tried)
            )
            ours, more = (
                (Setting("as given", options.ours), [])
                if options.ours is not None
                else bench.sweep("ours", our_gpu_settings() if bench.gpu else our_settings(options.quick))
            )
            result: dict[str, Any] = {"benchmark": "sft", "dtype": dtype, "model": options.model}
            result |= {"rows_per_step": options.rows, "max_tokens": options.max_tokens, "steps": options.steps}
            if not options.sweep:
                result |= pairs(bench, ours, trl)
                result |= {} if bench.gpu else {"prepare": prepare(bench)}
            print(json.dumps(result | about | {"sweep": table + more}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
