"""The files of `tulu pairs`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.files import write_rows
from tulu_lightning.recipes.making.parquet import columns_of, write_parquet

__all__ = ["RULE", "check_output", "write_pairs"]

RULE = (
    *("literal", "min_chosen", "sides", "verified", "on_policy_share", "held_out_share", "seed"),
    *("limit", "input", "ratings"),
)
"""Settings of `tulu pairs` that make other pairs."""


def check_output(output: Path, rule: Mapping[str, Any]) -> None:
    """Refuse a folder whose pairs were made by another rule; what they are made of is checked where it is made.

    Raises:
        InputError: names the first setting that differs.
    """
    try:
        before = json.loads((output / "summary.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    for name, value in rule.items():
        if name == "limit" and (value is None or (before.get(name) or value) <= value):
            continue  # more prompts than before
        if name in before and before[name] != value:
            what = f"holds pairs made with {name} = {before[name]}, not {value}"
            raise InputError(str(output), what, "Give another output, or remove its summary.json and pairs.")


def write_pairs(path: Path, rows: Sequence[Mapping[str, Any]], kind: str, needed: bool = True) -> None:
    """Write a file of pairs, and remove one that settings of before left under that name.

    Args:
        path: without a suffix.
        rows: the pairs.
        kind: `jsonl` or `parquet`, which is the suffix too.
        needed: write it even if it is empty.
    """
    if (rows or needed) and kind == "parquet":
        write_parquet(path.with_suffix(".parquet"), rows, columns_of([rows]))
    elif rows or needed:
        write_rows(path.with_suffix(".jsonl"), rows)
    for suffix in ("jsonl", "parquet"):
        if suffix != kind or not (rows or needed):
            path.with_suffix(f".{suffix}").unlink(missing_ok=True)
