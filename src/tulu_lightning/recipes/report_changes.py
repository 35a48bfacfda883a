"""Settings that differ: a stage's from those of its config files, and those of one run from another's."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from tulu_lightning.recipes.reading import mapping
from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_parts import escape

__all__ = ["Change", "between_runs", "changes_table", "from_files", "leaves"]

UNSET = "(not set)"
IGNORED = ("trainer.default_root_dir",)
"""Keys that differ between any two runs and say nothing about them."""
LIMIT = 300
"""Characters of a value that are shown."""


class Change(NamedTuple):
    """One setting and its two values, as text."""

    key: str
    one: str
    other: str


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a config; empty mappings and lists are values."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for place, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{place}]")
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def from_files(stage: StageRecord) -> list[Change] | None:
    """What the command line (for a stage of a recipe: the recipe) set, beside what the config files say.

    Returns:
        None where the run has not recorded it, as those of older versions have not.
    """
    if stage.origin is None:
        return None
    files = dict(leaves(mapping(stage.origin.get("files_say"))))
    return [
        Change(key, files.get(key, UNSET), value)
        for key, value in leaves(mapping(stage.origin.get("command_line")))
        if key and files.get(key) != value
    ]


def between_runs(one: StageRecord, other: StageRecord) -> list[Change] | None:
    """Settings of two stages that differ; None where one of them has no config that can be read."""
    configs = [_parsed(stage.config) for stage in (one, other)]
    if any(config is None for config in configs):
        return None
    here, there = (dict(leaves(config)) for config in configs)
    keys = [key for key in dict.fromkeys([*here, *there]) if key not in IGNORED]
    return [Change(key, here.get(key, UNSET), there.get(key, UNSET)) for key in keys if here.get(key) != there.get(key)]


def _parsed(text: str | None) -> Any:
    try:
        value = yaml.safe_load(text or "")
    except yaml.YAMLError:  # cut off while being written
        return None
    return value if isinstance(value, dict) else None


def changes_table(changes: list[Change], names: tuple[str, str]) -> str:
    """The changes as a table; on a phone a block each.

    Args:
        changes: at least one.
        names: whose the two values are.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Setting", *names))
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(change.key)}</code></th>'
        f'<td data-label="{escape(names[0])}">{_value(change.one)}</td>'
        f'<td data-label="{escape(names[1])}">{_value(change.other)}</td></tr>'
        for change in changes
    )
    return (
        f'<div class="card"><table class="scores changes"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _value(text: str) -> str:
    if text == UNSET:
        return f'<span class="empty">{UNSET}</span>'
    return f"<code>{escape(text if len(text) <= LIMIT else text[:LIMIT] + '…')}</code>"
