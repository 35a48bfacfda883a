"""Sampling on a CPU: the engine in this process against transformers' `generate`, and against vLLM where it is installed.

    python benchmarks/generate.py --vllm-python VENV/bin/python --out result.json
    python benchmarks/generate.py --quick                     # a few minutes, without vLLM
    python benchmarks/generate.py --cases short --dtype bfloat16

Cases: `short`, 32 chat prompts with one sample each; `wide`, the same with four; `shared`, 4 prompts of 600 tokens with 8
samples each. All rows are `--new-tokens` long (no end token counts), at temperature 1 without filters. The rate is new
tokens over the seconds of the call, the prompts' own computation in it; a CPU second counts each thread. Sides run in
turn, each run a process of its own whose first call is not counted. transformers runs with the better of its caches.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measure import machine
from transformers.utils import logging as transformers_logging
from turns import median, ratios, say

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.assets.rows import alpaca_rows

PEERS = Path(__file__).parent / "peers"
MODEL = "smollm2-135m-instruct"
CASES = {"short": (32, 1), "wide": (32, 4), "shared": (4, 8)}
"""Prompts and samples of each."""
LONG = 600


def prompts(case: str) -> list[list[int]]:
    """Real questions in the model's chat template; for `shared`, rows of text up to 600 tokens."""
    tokenizer = load_tokenizer(str(resolve_model(MODEL)))
    count, _ = CASES[case]
    rows = [row["messages"] for row in alpaca_rows(limit=400)]
    if case == "shared":
        text = [
            tokenizer.encode("\n\n".join(f"{a['content']}\n{b['content']}" for a, b in rows[i::count]))
            for i in range(count)
        ]
        return [ids[:LONG] for ids in text]
    found = [tokenizer.apply_chat_template(row[:1], add_generation_prompt=True, return_dict=False) for row in rows]
    return [ids for ids in found if len(ids) <= 64][:count]


class Bench:
    """The prompts of one case; runs one side once."""

    def __init__(self, options: argparse.Namespace, case: str) -> None:
        self.options, self.case, self.prompts = options, case, prompts(case)
        if len(self.prompts) < CASES[case][0] or (case == "shared" and min(map(len, self.prompts)) < LONG):
            raise SystemExit(f"{case}: too few rows for its prompts")

    def run(self, side: str, settings: dict[str, Any], new_tokens: int | None = None) -> dict[str, Any]:
        """One process; adds the rates to what the worker measured."""
        new = new_tokens or self.options.new_tokens
        job = {
            "model": str(resolve_model(self.options.model)),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "prompts": self.prompts,
            "samples": CASES[self.case][1],
            "new_tokens": new,
            "repeats": self.options.repeats,
            "settings": settings,
        }
        python = self.options.vllm_python if side == "vllm" else sys.executable
        command = [python, str(PEERS / f"{side}_generate.py"), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
        if done.returncode:
            raise SystemExit(f"{side} failed on {settings}:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        expected = len(self.prompts) * CASES[self.case][1] * new
        if any(tokens != expected for tokens in result["tokens"]):
            raise SystemExit(f"{side} made {result['tokens']} tokens, not {expected} a call")
        result["rate"] = sum(result["tokens"]) / sum(result["seconds"])
        result["cpu_rate"] = sum(result["tokens"]) / sum(result["cpu_seconds"])
        say(
            f"{self.case:7} {side:5} {json.dumps(settings):42} {result['rate']:7.1f} tokens/s  "
            f"{result['cpu_rate']:6.1f} a CPU second  {result['peak_bytes'] / 1e9:5.2f} GB"
        )
        return result

    def best_cache(self, dtype: str) -> str:
        """Of transformers' two, by a shorter run."""
        short = max(8, self.options.new_tokens // 4)
        rates = {name: self.run("hf", {"dtype": dtype, "cache": name}, short)["rate"] for name in ("dynamic", "static")}
        return max(rates, key=lambda name: rates[name])

    def compare(self, dtype: str) -> dict[str, Any]:
        """All sides in turn, the next round the other way round."""
        cache = self.options.cache or self.best_cache(dtype)
        sides: dict[str, dict[str, Any]] = {
            "ours": {"dtype": dtype, "engine": {}},
            "hf": {"dtype": dtype, "cache": cache},
        }
        if self.options.vllm_python:
            sides["vllm"] = {"dtype": dtype}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(self.options.rounds):
            for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                runs[side].append(self.run(side, sides[side]))
        found: dict[str, Any] = {
            side: {
                "tokens_per_second": round(median(runs[side], "rate"), 1),
                "tokens_per_cpu_second": round(median(runs[side], "cpu_rate"), 1),
                "peak_bytes": max(run["peak_bytes"] for run in runs[side]),
                "setting": sides[side],
            }
            for side in sides
        }
        for side in list(sides)[1:]:
            found[f"ratio_{side}"] = ratios(runs["ours"], runs[side])
            found[f"cpu_ratio_{side}"] = ratios(runs["ours"], runs[side], "cpu_rate")
        about = {"benchmark": "generate", "case": self.case, "dtype": dtype, "model": self.options.model}
        shape = {"prompts": len(self.prompts), "samples": CASES[self.case][1], "new_tokens": self.options.new_tokens}
        return about | shape | {"prompt_tokens": sum(map(len, self.prompts))} | found


def table(results: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'case':8}{'dtype':10}{'side':6}{'tokens/s':>10}{'a CPU s':>9}{'ours over it':>14}"]
    for result in results:
        for side in ("ours", "hf", "vllm"):
            if side in result:
                ratio = result.get(f"ratio_{side}", {}).get("median")
                lines.append(
                    f"{result['case']:8}{result['dtype']:10}{side:6}{result[side]['tokens_per_second']:10.1f}"
                    f"{result[side]['tokens_per_cpu_second']:9.1f}{'' if ratio is None else f'{ratio:.2f}':>14}"
                )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a folder (`shapes.py` makes some)")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of one run, after the first")
    parser.add_argument("--cache", choices=("dynamic", "static"), help="transformers' cache, in place of trying both")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vLLM")
    parser.add_argument("--out", type=Path, help="a file for the results as JSON")
    parser.add_argument("--quick", action="store_true", help="one round of one call, bfloat16, cases short and shared")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats, options.dtype, options.cases = 1, 1, ["bfloat16"], ["short", "shared"]
    transformers_logging.set_verbosity_error()
    about = machine()
    results = [Bench(options, case).compare(dtype) for case in options.cases for dtype in options.dtype]
    say(table(results))
    text = json.dumps({"command": " ".join(["python", *sys.argv]), **about, "runs": results}, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
