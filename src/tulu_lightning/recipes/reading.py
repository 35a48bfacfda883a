"""JSON of a run that may have been killed at any moment: reading it forgives, and notes what it left out."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

__all__ = ["callback_settings", "mapping", "number", "read_lines", "read_object", "text"]


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else (a missing key, text, true, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON integers have no limit
        return None


def read_object(path: Path, label: str, notes: list[str]) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no such file, or (with a note) something else in it."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{label} is not a JSON object (cut off while being written?) and was left out.")
        return None
    return value


def read_lines(path: Path, label: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; a torn line is counted in a note and skipped."""
    if not path.is_file():
        return
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            else:
                torn += 1
    if torn:
        notes.append(f"{label}: {torn} torn {'line was' if torn == 1 else 'lines were'} left out.")


def text(value: Any) -> str:
    """The value as text that any file can hold: a lone surrogate is legal in JSON and not in UTF-8."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a JSON object, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def callback_settings(config: str | None, name: str) -> dict[str, Any]:
    """What a stage's config gives its callback of that class; empty where it has none, or was cut off.

    Args:
        config: text of the config.
        name: of the class, e.g. `Promote`.
    """
    with suppress(yaml.YAMLError, LookupError, AttributeError, TypeError):
        for callback in yaml.safe_load(config or "")["trainer"]["callbacks"]:
            if str(callback.get("class_path")).endswith(f".{name}"):
                return mapping(callback.get("init_args"))
    return {}
