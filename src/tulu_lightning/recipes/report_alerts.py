"""What looks wrong in a run, each with the evidence beside it and no claim beyond it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from tulu_lightning.core.alerts import Alert, AlertLimits, alerts
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.reading import callback_settings
from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_parts import escape
from tulu_lightning.recipes.report_tasks import HELD_OUT, moments_of, tasks_of

__all__ = ["Told", "alerts_section", "find_alerts"]


class Told(NamedTuple):
    """One alert and where on the page its curves are."""

    stage: str
    alert: Alert
    link: str
    """Id of the stage's curves."""


def find_alerts(stages: Sequence[StageRecord], links: Sequence[str]) -> list[Told]:
    """The alerts of every stage, from its recorded numbers.

    Args:
        stages: of a run.
        links: of each, the id of its curves.
    """
    found = []
    for stage, link in zip(stages, links, strict=True):
        scores = [
            {"step": step, "task": task, "score": scores.accuracy}
            for task in (HELD_OUT, *tasks_of(stage))
            for step, scores in moments_of(stage, task)
        ]
        found += [Told(stage.name, alert, link) for alert in alerts(stage.metrics, scores, _limits(stage.config))]
    return found


def _limits(config: str | None) -> AlertLimits | None:
    """Those that the run's own callback went by, so that page and log agree; None for the usual ones."""
    limits = callback_settings(config, "Alerts").get("limits")
    with suppress(TypeError, InputError):
        return AlertLimits(**limits) if limits else None
    return None


def alerts_section(found: Sequence[Told]) -> str:
    """The section; empty where nothing looks wrong."""
    if not found:
        return ""
    lead = "What rules on the recorded numbers saw. They say where to look, not why; no alert does not mean that all is well."
    items = "".join(_alert(one) for one in found)
    return f'<h2 id="alerts">Alerts</h2><p class="lead">{lead}</p><div class="alerts">{items}</div>'


def _alert(one: Told) -> str:
    stage, alert, link = one
    steps = f"step {alert.first}" if alert.first == alert.last else f"steps {alert.first} to {alert.last}"
    return (
        f'<article class="card alert"><b>{escape(alert.rule)}</b> <small>{escape(stage)}, {steps}</small>'
        f'<p>{escape(alert.text)}</p><a href="#{link}">Curves of {escape(stage)}</a></article>'
    )
