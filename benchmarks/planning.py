"""How long it takes to plan a run, how level the ranks are, and how full the micro-batches.

    python benchmarks/planning.py --rows 1000000 --world-size 8 --micro-tokens 8192

Plans every step of one epoch, micro-batches of every rank included, over chat-like lengths (log-normal, median 500,
cut to 30..4096), and prints one JSON line. `balance` is the dearest rank of a step over the mean (1 = level), `bound`
what it is at the least because of the dearest row, `lockstep` the sum over micro-batches of the dearest rank's cost over
the mean (what ranks that wait for each other pay), all averaged over the steps; `fill` is tokens over the tokens computed: of micro-batches as long as the longest of their
step without --pad-to, padding included with it. Lengths lie in an array; peak memory is over what Python and torch
take to start.
"""

import argparse
import json
import resource
import time

import torch

from tulu_lightning.core.step_plan import StepPlan, cost, cut


def chat_lengths(rows: int, seed: int = 0) -> torch.Tensor:
    """Log-normal lengths, median 500, cut to 30..4096 tokens, as int32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator).mul_(0.9).add_(6.2146).exp_().clamp_(30, 4096).int()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--examples-per-step", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--pad-to", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="pack the whole set at once instead of step by step")
    options = parser.parse_args()
    lengths = chat_lengths(options.rows)
    before = peak_bytes()
    started = time.perf_counter()
    if options.whole:
        steps = [cut(lengths.tolist(), options.micro_tokens, options.world_size, options.pad_to)]
        seconds = time.perf_counter() - started
    else:
        plan = StepPlan(
            lengths, options.examples_per_step, options.micro_tokens, 0, 1, None, options.world_size, options.pad_to
        )
        for step in range(plan.total_steps):
            plan.ranks(step)
        seconds = time.perf_counter() - started
        every = max(1, plan.total_steps // 500)
        steps = [plan.ranks(step) for step in range(0, plan.total_steps, every)]
    peak = peak_bytes() - before
    whole = lengths.tolist()
    measures = torch.tensor([measure(step, whole, options.pad_to) for step in steps]).mean(0).tolist()
    result = {
        **vars(options),
        "steps": 1 if options.whole else plan.total_steps,
        "seconds": round(seconds, 2),
        "peak_mb": round(peak / 2**20, 1),
        **{
            name: round(value, 4)
            for name, value in zip(("balance", "bound", "lockstep", "fill"), measures, strict=True)
        },
    }
    print(json.dumps(result))
    return 0


def measure(ranks: list[list[tuple[int, ...]]], lengths: list[int], pad_to: int) -> tuple[float, ...]:
    """Balance, its bound, lock-step balance and fill of one step."""
    costs = [[sum(cost(lengths[row]) for row in micro) for micro in micros] for micros in ranks]
    mean = sum(map(sum, costs)) / len(costs)
    tokens = [sum(lengths[row] for row in micro) for micros in ranks for micro in micros if micro]
    computed = sum(-(-count // pad_to) * pad_to for count in tokens) if pad_to else max(tokens) * len(tokens)
    lockstep = sum(map(max, zip(*costs, strict=True)))
    dearest = max(cost(lengths[row]) for micros in ranks for micro in micros for row in micro)
    return max(map(sum, costs)) / mean, max(1.0, dearest / mean), lockstep / mean, sum(tokens) / computed


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())
