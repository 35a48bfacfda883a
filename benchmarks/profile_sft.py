"""Where the time of an SFT step goes, by what is being computed.

    python benchmarks/profile_sft.py --dtype bfloat16

One step of real chat rows on SmolLM2 under torch's profiler, after one to warm up. The self time of every operator is
booked on the part of the model that asked for it (backward on the part whose forward it belongs to), and there on matrix
products, casts between dtypes, or the rest.
"""

import argparse
import collections
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from sft import MODEL, Bench
from torch.profiler import ProfilerActivity, profile, record_function

from tulu_lightning.core import nll
from tulu_lightning.core.gradients import accumulating
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.models import backbone, linear
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.stages.optimizer import AdamW

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm", "mkldnn::_linear_pointwise")
CASTS = ("aten::to", "aten::_to_copy", "autograd::engine::evaluate_function: ToCopyBackward0")
SCOPES = ("norm", "rope", "attention", "mlp", "projections", "head and loss", "embedding", "clip", "optimiser")


def scoped(name: str, call: Any) -> Any:
    """The call, under a name that the profile shows."""

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return wrapper


def name_parts(model: PackedLM) -> None:
    """Wrap the parts of a Llama so that the profile can tell them apart."""
    for path, module in model.named_modules():
        kind, leaf = type(module).__name__, path.rpartition(".")[2]
        if kind.endswith("RMSNorm"):
            module.forward = scoped("norm", module.forward)
        elif kind.endswith("MLP"):
            module.forward = scoped("mlp", module.forward)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = scoped("rope", module.forward)
        elif kind == "Embedding":
            module.forward = scoped("embedding", module.forward)
        elif leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module.forward = scoped("projections", module.forward)
    linear.rotary = scoped("rope", linear.rotary)
    linear.segment_attention = scoped("attention", linear.segment_attention)
    backbone.weighted_nll = scoped("head and loss", nll.weighted_nll)


def chain(event: Any) -> list[Any]:
    """An operator and those that called it, the innermost first."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def part_of(events: list[Any], forward: dict[int, str]) -> str:
    """The part of the model that a chain of operators works for."""
    for event in events:
        if event.name in SCOPES:
            return event.name
        if "_WeightedNll" in event.name:
            return "head and loss"
    for event in events:  # an autograd node carries the number of the forward operator that it belongs to
        if event.sequence_nr in forward:
            return forward[event.sequence_nr]
    return "gradients added up" if any("AccumulateGrad" in event.name for event in events) else "residuals, other"


def kind_of(events: list[Any]) -> str:
    """What kind of work the innermost operator of a chain is."""
    if "flash_attention" in events[0].name:
        return "kernel"
    if any(event.name in CASTS for event in events):
        return "casts"
    return "matrix products" if events[0].name in PRODUCTS else "rest"


def book(events: Any) -> dict[tuple[str, str], float]:
    """Self time in milliseconds by (part of the model, kind of work)."""
    chains = [chain(event) for event in events]
    forward: dict[int, str] = {}
    for found in chains:
        scope = next((event.name for event in found if event.name in SCOPES), None)
        if scope and found[0].sequence_nr >= 0:
            forward.setdefault(found[0].sequence_nr, scope)
    times: dict[tuple[str, str], float] = collections.defaultdict(float)
    for found in chains:
        times[part_of(found, forward), kind_of(found)] += found[0].self_cpu_time_total / 1000
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=16, help="rows of the step")
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--recompute-mlps", action="store_true")
    parser.add_argument("--top", type=int, default=0, help="also the operators with the most self time")
    options = parser.parse_args()
    options.steps = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, options.dtype, Path(folder))
        rows, _ = bench.files(1)
        data = SFTData(
            sources=[Source("rows", path=str(rows))],
            tokenizer=bench.model,
            template="smollm2",
            max_tokens=options.max_tokens,
            examples_per_step=options.rows,
            micro_tokens=options.micro_tokens,
        )
        data.setup()
        batch = next(iter(data.train_dataloader()))
    config = Backbone(bench.model, compute_dtype=options.dtype, recompute_mlps=options.recompute_mlps)
    model = PackedLM(config, bench.model)
    name_parts(model)
    optimizer = AdamW(lr=1e-5).build(model.parameters())

    def step() -> None:
        for pack in batch.packs:
            with accumulating():
                model(pack, weight_N=pack.weight_N / batch.denominator).nll.backward()
        with record_function("clip"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with record_function("optimiser"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        step()
    times = book(profiler.events())
    total = sum(times.values())
    tokens = sum(pack.tokens_T.numel() for pack in batch.packs)
    print(f"{options.dtype}, {tokens} tokens in {len(batch.packs)} passes, {total / 1000:.2f} s of operators\n")
    print("| part | work | share | ms |\n| --- | --- | --: | --: |")
    for (scope, kind), time in sorted(times.items(), key=lambda item: -item[1]):
        if time > 0.002 * total:
            print(f"| {scope} | {kind} | {time / total:.1%} | {time:.0f} |")
    if options.top:
        print(
            profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=options.top, max_name_column_width=70
            )
        )


if __name__ == "__main__":
    main()
