"""What every stage was trained on, from its data manifest."""

import re
from collections.abc import Mapping
from typing import Any

from tulu_lightning.recipes.reading import mapping, number
from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_parts import cell_table, escape
from tulu_lightning.recipes.table import NOTHING, Cell, count

__all__ = ["data_part"]

COLUMNS = ("rows", "kept", "left_out", "truncated", "repeated", "used", "tokens", "trained_tokens")


def data_part(stage: StageRecord) -> str:
    """The manifest of one stage as a table; empty where none is recorded."""
    manifest = stage.manifest or {}
    sources = _sources(manifest)
    held_out = {f"{name} (held out)": s for name, s in _sources(mapping(manifest.get("validation"))).items()}
    if not sources:
        return ""
    rows = [_row(name, mapping(source)) for name, source in (sources | held_out).items()]
    if len(sources) > 1:
        rows.append(_row("all that is trained on", mapping(manifest.get("totals"))))
    headings = ["Source", *(name.replace("_", " ").capitalize() for name in COLUMNS)]
    settings = ", ".join(f"{key} {_brief(value)}" for key, value in mapping(manifest.get("settings")).items())
    facts = [f"Content <code>{escape(str(manifest.get('digest', ''))[:16])}</code>"]
    facts += [escape(settings)] if settings else []
    return f"""<h3>{escape(stage.name)}</h3>{cell_table(headings, rows)}
<p class="under">{" · ".join(facts)}</p>"""


def _brief(value: object) -> str:
    """As it is; of a hash, as much as tells it from others."""
    words = str(value)
    return words[:16] if re.fullmatch(r"[0-9a-f]{32,}", words) else words


def _sources(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return mapping(manifest.get("sources"))


def _row(name: str, source: Mapping[str, Any]) -> list[Cell]:
    reasons = mapping(source.get("left_out"))
    why = ", ".join(f"{number(value) or 0:,.0f} {reason}" for reason, value in reasons.items())
    out = sum(number(value) or 0 for value in reasons.values()) if reasons else number(source.get("left_out")) or 0
    cells = []
    for column in COLUMNS:
        value = number(source.get(column))
        if column == "left_out":
            cells.append(Cell(f"{out:,.0f}", why))
        elif column.endswith("tokens"):
            cells.append(Cell(count(value)))
        else:
            cells.append(Cell(NOTHING if value is None else f"{value:,.0f}"))
    return [Cell(name), *cells]
