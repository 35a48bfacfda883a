"""What `tulu generate` wrote, by prompt, for the commands that go on with it."""

import re
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.store import read_rows, read_settings

__all__ = ["groups_of"]

FIELDS = ("key", "prompt_key", "messages", "source", "model", "response", "finish", "tokens")
"""What judging and pairing read."""


def groups_of(
    folder: str | Path, limit: int | None = None, ids: bool = False
) -> tuple[list[list[dict[str, Any]]], int]:
    """The responses of each prompt that has all of them (as in the release), in order; and how many prompts lack one.

    They are held in memory, so a prompt that all of its responses repeat is held once, and token ids as an array of 32
    bits a token (a list of Python's numbers takes nine times that), or not at all.

    Args:
        folder: that was written.
        limit: only the first so many prompts.
        ids: whether token ids are wanted.

    Raises:
        InputError: no row is there, or none has all of its responses, or a row lacks a field.
    """
    made: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(read_rows(folder), start=1):
        for name in FIELDS:
            if name not in row:
                raise InputError(f"{folder}, row {number}", f"has no field {name!r}", "Give what tulu generate wrote.")
        if not re.fullmatch("[0-9a-f]{12,}", str(row["prompt_key"])):
            what = f"prompt_key is {row['prompt_key']!r}, which is no hash"
            raise InputError(f"{folder}, row {number}", what, "Give what tulu generate wrote.")
        group = made[row["prompt_key"]]
        group.append(_small(row, group, ids))
    settings = read_settings(folder)
    each = settings.get("draw") == "each"
    expected = settings.get("responses", 1) * (len(settings.get("models", [])) if each else 1)
    whole = [sorted(group, key=lambda row: row["key"]) for group in made.values() if len(group) >= expected]
    if not whole:
        what = f"of {len(made)} prompts none has all of its {expected} responses"
        raise InputError(str(folder), what, "Let tulu generate finish first.")
    return whole[:limit], len(made) - len(whole)


def _small(row: dict[str, Any], group: list[dict[str, Any]], ids: bool) -> dict[str, Any]:
    """The row, with what the first of its group has as well shared with that."""
    for name in ("ids", "prompt_ids"):
        if name in row:
            row[name] = array("I", row[name]) if ids else None
    for name in ("messages", "prompt_ids", "checks"):
        if group and name in row and row[name] == group[0].get(name):
            row[name] = group[0][name]
    return row
