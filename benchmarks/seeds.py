"""The demo's recipe on several seeds: does each stage raise held-out accuracy, and is PPO's gain beyond chance?

    python benchmarks/seeds.py --config configs/recipes/smol.yaml --seeds 1 2 3 --out benchmarks/results/smol_seeds.json

Runs `tulu recipe` once a seed (one that was stopped goes on), then writes one JSON file and prints one line a seed and
stage. `--collect RUN ...` reads finished run folders instead, such as that of `make demo`. The intervals are paired
bootstraps over the same held-out items, 95%.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from tulu_lightning.core.stats import paired_bootstrap
from tulu_lightning.evaluation.heldout import Scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/recipes/smol.yaml", help="the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", default="runs/seeds", help="folder for the run folders")
    parser.add_argument("--out", default="benchmarks/results/smol_seeds.json")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="RUN", help="read these run folders, run nothing")
    options = parser.parse_args()
    runs = options.collect or [
        recipe(options.config, seed, Path(options.runs, f"seed-{seed}")) for seed in options.seeds
    ]
    records = [json.loads((run / "recipe.json").read_text()) for run in runs]
    results = [
        {"seed": record["seeds"]["seed"], "command": record["command"], "stages": stages(run)}
        for record, run in zip(records, runs, strict=True)
    ]
    whole = {"machine": machine(), "versions": records[0]["versions"], "runs": results}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(whole, indent=1) + "\n")
    show(results)
    return 0


def recipe(config: str, seed: int, run: Path) -> Path:
    """Run the recipe with one seed, in a process of its own; returns the run folder."""
    command = ["recipe", "--config", config, f"--seed={seed}", f"--run={run}"]
    subprocess.run([sys.executable, "-m", "tulu_lightning", *command], check=True)
    return run


def stages(run: Path) -> dict[str, Any]:
    """Scores, paired difference, time and memory of each training stage of one run."""
    found: dict[str, Any] = {}
    for summary in sorted(run.glob("*/summary.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(summary.read_text())
        row = {key: record[key] for key in ("seconds", "tokens", "peak_memory_bytes") if key in record}
        folder = summary.parent / "scores"
        if folder.exists():
            before, after = (Scores.from_json(folder / f"{when}.json") for when in ("before", "after"))
            difference, low, high = paired_bootstrap(before.per_item, after.per_item)
            row |= {"n": after.n, "before": before.accuracy, "after": after.accuracy, "after_interval": after.interval}
            row |= {"difference": difference, "difference_interval": [low, high], "promoted": record["promoted"]}
            row["steps"] = record["steps"]
        else:
            row |= {key: record[key] for key in ("prompts", "samples", "pairs", "right_share")}
        found[summary.parent.name] = row
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def show(results: list[dict[str, Any]]) -> None:
    """One line a seed and stage."""
    for result in results:
        for name, row in result["stages"].items():
            if "difference" in row:
                low, high = row["difference_interval"]
                print(
                    f"seed {result['seed']}  {name:4}  {row['before']:.3f} -> {row['after']:.3f}  "
                    f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]  {row['seconds']:.0f} s"
                )


if __name__ == "__main__":
    sys.exit(main())
