"""A checkpoint that is offered for promotion: the decision by its scores, and all that the record of it holds."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.callbacks.suite import Scored, paired, read_moment
from tulu_lightning.checkpoints.card import LINEAGE, chain_behind, entry, model_card, told
from tulu_lightning.checkpoints.identity import read_identity, weights_digest
from tulu_lightning.checkpoints.promoted import code_version, export_folder
from tulu_lightning.core.gain import Look
from tulu_lightning.core.promotion import Decision, PromotionRule, TaskVerdict
from tulu_lightning.errors import InputError

__all__ = ["Offer", "decide", "decision_of", "record_of", "write_card"]

FORMAT = 1


class Offer(NamedTuple):
    """A checkpoint and what was decided on it; None where that is on disk already."""

    step: int
    moment: str
    decision: Decision | None


def decide(rule: PromotionRule, run: Path, moment: str, look: Look, earlier: Sequence[Mapping[str, Any]]) -> Decision:
    """Apply a rule to the scores of a moment.

    Args:
        rule: the rule.
        run: folder of the run, with its scores.
        moment: of the scores that are offered.
        look: which of the run's looks this is.
        earlier: records of the earlier ones. Gains are held against the last that was promoted.
    """
    start, after = read_moment(run, "before"), read_moment(run, moment)
    standing = next((r["moment"] for r in reversed(earlier) if r["decision"]["promote"]), "before")
    for name, scores in (("start", start), ("later" if moment != "after" else "final", after)):
        if not scores:
            return Decision(False, f"there are no held-out scores of the {name} weights", None, None, None)
    try:
        roles = rule.roles(list(after))
        replaced = start if standing == "before" else read_moment(run, standing)
        pairs = paired(replaced, after, [task for task, role, _ in roles if role == "gain"])
        pairs |= paired(start, after, [task for task, role, _ in roles if role == "guard"])
        return rule.judge(pairs, look)
    except InputError as error:
        return Decision(False, f"the held-out scores do not compare: {error.what}", None, None, None)


def decision_of(record: Mapping[str, Any]) -> Decision:
    """The decision that a record holds."""
    kept = dict(record["decision"])
    return Decision(**{**kept, "verdicts": tuple(TaskVerdict(**verdict) for verdict in kept["verdicts"])})


def record_of(run: Path, stage: Any, offer: Offer) -> dict[str, Any]:
    """All that is known of a checkpoint when it is decided on."""
    assert offer.decision is not None
    folder = export_folder(run, offer.step)
    identity = read_identity(run) or stage.identity()
    config = run / "config.yaml"
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": str(run),
        "stage": type(stage).__name__,
        "step": offer.step,
        "steps_planned": stage.total_steps,
        "moment": offer.moment,
        "decision": asdict(offer.decision),
        "scores": {
            when: {task: _summary(one) for task, one in read_moment(run, moment).items()}
            for when, moment in (("before", "before"), ("after", offer.moment))
        },
        "export": os.path.relpath(folder, run) if folder.is_dir() else None,
        "weights": weights_digest(folder) if folder.is_dir() else None,
        "parent": {
            "path": stage.start,
            "folder": stage.folder,
            "relative": os.path.relpath(stage.folder, run.resolve()),
            "weights": stage.start_digest,
        },
        "cost": _cost(run, offer.step),
        "identity": identity,
        "data": identity.get("data rows"),
        "code": code_version(),
        "config": config.read_text(encoding="utf-8") if config.exists() else None,
    }


def _summary(one: Scored) -> dict[str, Any]:
    fields = one._asdict()
    return {name: fields[name] for name in ("score", "low", "high", "n", "settings", "version")}


def _cost(run: Path, step: int) -> dict[str, float]:
    """What the steps up to this one took."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["step"] <= step]
    sums = {name: sum(row.get(name) or 0 for row in rows) for name in ("seconds", "tokens", "trained_tokens")}
    return {"steps": step, **sums}


def write_card(folder: Path, run: Path, stage: Any, moment: str) -> None:
    """The model card and the chain of stages, beside weights that are being exported.

    Args:
        folder: of the weights.
        run: of the run.
        stage: what was trained.
        moment: whose scores the weights have, if there are any.
    """
    manifest = run / "data_manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    scores = {name: told(one._asdict()) for name, one in read_moment(run, moment).items()}
    identity = read_identity(run) or stage.identity()
    own = entry(type(stage).__name__, stage.step, stage.start, identity, data, scores)
    chain = [*chain_behind(stage.folder), own]
    (folder / LINEAGE).write_text(json.dumps(chain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(chain, chain[0]["start"]), encoding="utf-8")
