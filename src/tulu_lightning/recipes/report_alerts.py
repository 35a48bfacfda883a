"""What looks wrong in a run, each with the evidence beside it and no claim beyond it."""

from collections.abc import Sequence
from typing import NamedTuple

from tulu_lightning.recipes.report_parts import escape

__all__ = ["Told", "alerts_section"]


class Told(NamedTuple):
    """One alert, in words."""

    stage: str
    title: str
    """What looks wrong."""
    evidence: tuple[str, ...]
    """The numbers that it was seen in, with their steps; one line each."""


def alerts_section(found: Sequence[Told]) -> str:
    """The section; empty where nothing looks wrong."""
    if not found:
        return ""
    lead = "Rules that fired, with what they saw. They say where to look, not why; no alert does not mean that all is well."
    items = "".join(_alert(one) for one in found)
    return f'<h2 id="alerts">Alerts</h2><p class="lead">{lead}</p><div class="alerts">{items}</div>'


def _alert(one: Told) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in one.evidence)
    listed = f"<ul>{lines}</ul>" if lines else ""
    return (
        f'<article class="card alert"><b>{escape(one.title)}</b> <small>{escape(one.stage)}</small>{listed}</article>'
    )
