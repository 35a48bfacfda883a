"""`tulu prompts`: a set of prompts that a program can verify, built from its sources: what RLVR trains on.

Tülu 3's own (section 6.1, table 22): GSM8K and MATH with worked examples before each question, and chat prompts with constraints drawn
for them. What is written has the columns that `PromptData` reads without further settings.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_lightning.assets.constraints import DRAWS
from tulu_lightning.core.settings import require
from tulu_lightning.data.constraints import constrained
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_rows, write_whole
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.making.asks import Ask, own_verifiers, prompt_key, read_asks
from tulu_lightning.verifiers.registry import Verifier, Verifiers

__all__ = ["PromptsConfig", "main", "make_prompts"]


@dataclass(frozen=True)
class PromptsConfig:
    """Build a set of prompts with ground truth."""

    output: str = ""
    """Folder for prompts.jsonl, held_out.jsonl and summary.json."""
    sources: list[PromptSource] = field(default_factory=list)
    """Rows that say what verifies an answer: `ground_truth` and `verifier`, or a reader that knows (gsm8k, math)."""
    constrained: list[PromptSource] = field(default_factory=list)
    """Chat rows whose last request gets one to three constraints, verified by `ifeval`."""
    kinds: list[str] = field(default_factory=lambda: list(DRAWS))
    """Which constraints are drawn: IFEval's instruction ids."""
    held_out: list[PromptSource] = field(default_factory=list)
    """As `sources`, for held_out.jsonl; a prompt that is here too, `limit` or not, is left out of prompts.jsonl."""
    verifiers: dict[str, Verifier] = field(default_factory=dict)
    """Own verifiers by name, as class_path and init_args."""
    seed: int = 0
    limit: int | None = None
    """Only the first so many prompts of each list."""
    dry_run: bool = False
    """Show the first prompt of each source, and write nothing."""


def main(argv: Sequence[str]) -> int:
    """`tulu prompts --config FILE`."""
    config, _ = read_config(PromptsConfig, "tulu prompts", argv)
    make_prompts(config)
    return 0


def make_prompts(config: PromptsConfig) -> dict[str, Any]:
    """Read, draw and write.

    Returns:
        The summary that is also written to `summary.json`; empty after a dry run.

    Raises:
        InputError: bad sources, a row that does not say what verifies it, a target that its verifier cannot use, or a
            prompts.jsonl that is there already.
    """
    require(config.output != "", "output", "empty", "Give a folder.")
    require(config.limit is None or config.limit >= 1, "limit", config.limit, "Use at least 1, or leave it out.")
    if not config.sources and not config.constrained:
        raise InputError("sources", "there is none", "Give sources, constrained, or both.")
    out = Path(config.output, "prompts.jsonl")
    if out.exists() and not config.dry_run:
        raise InputError(str(out), "is there already", "Give another output, or remove it.")
    verifiers = own_verifiers(config.verifiers)
    held = _verified(config.held_out, config, verifiers)
    made = [*_verified(config.sources, config, verifiers), *_with_constraints(config, verifiers)]
    every = read_asks(config.held_out, config.seed, None, verifiers).kept if config.held_out else []
    taken = {ask.question for ask in every}  # also beyond the limit: a trial's prompts are not to hold what is held out
    kept = [row for ask, row in made if ask.question not in taken]
    if not kept:
        raise InputError("sources", "no prompt is left that is not held out", "Give other rows.")
    if config.dry_run:
        for name, row in {row["source"]: row for row in reversed(kept)}.items():
            print(f"{name}: {row['verifier']}, target {row['ground_truth'][:200]}\n{row['messages'][-1]['content']}\n")
        return {}
    held_rows = [row for _, row in held]
    summary = {
        "stage": "prompts",
        "prompts": len(kept),
        "held_out": len(held_rows),
        "also_held_out": len(made) - len(kept),
        "sources": dict(Counter(row["source"] for row in kept)),
        "verifiers": dict(Counter(row["verifier"] for row in kept)),
        "constraints": dict(Counter(kind for row in kept for kind in row.get("constraints", ())).most_common()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if held_rows:
        write_rows(out.with_name("held_out.jsonl"), held_rows)
    write_whole(out.with_name("summary.json"), json.dumps(summary, indent=1))
    write_rows(out, kept)  # last: the file whose being there refuses another run says that all are there
    told = ", ".join(f"{count:,} of {name}" for name, count in summary["sources"].items())
    print(f"{len(kept):,} prompts ({told}), {len(held_rows):,} held out: {config.output}")
    return summary


def _verified(
    sources: Sequence[PromptSource], config: PromptsConfig, verifiers: Verifiers
) -> list[tuple[Ask, dict[str, Any]]]:
    """Each row beside the prompt that it is made of."""
    if not sources:
        return []
    rows = []
    for ask in read_asks(sources, config.seed, config.limit, verifiers).kept:
        if len(ask.checks) != 1:
            what = f"{ask.messages[-1]['content'][:80]!r} has {len(ask.checks)} checks"
            raise InputError(f"source {ask.source!r}", what, "Give ground_truth and verifier, or read: gsm8k or math.")
        (check,) = ask.checks
        rows.append((ask, _row(ask, check.verifier, check.target)))
    return rows


def _row(ask: Ask, verifier: str, target: str, **more: Any) -> dict[str, Any]:
    row = {"id": ask.key, "messages": ask.messages, "ground_truth": target, "dataset": verifier, "verifier": verifier}
    return {**row, "source": ask.source, **more}


def _with_constraints(config: PromptsConfig, verifiers: Verifiers) -> list[tuple[Ask, dict[str, Any]]]:
    if not config.constrained:
        return []
    asks = read_asks(config.constrained, config.seed, config.limit, verifiers).kept
    rows = []
    drawn = constrained([{"messages": ask.messages} for ask in asks], config.seed, config.kinds)
    for ask, made in zip(asks, drawn, strict=True):
        target = made["ground_truth"]
        if complaint := verifiers.complaint("ifeval", target):
            raise InputError(f"source {ask.source!r}", complaint, "Or leave kinds of constraints out.")
        own = ask._replace(key=prompt_key(made["messages"]), messages=made["messages"])
        kinds = json.loads(target)["instruction_id_list"]
        rows.append((ask, _row(own, "ifeval", target, constraints=kinds, constraint=made["constraint"])))
    return rows
