"""What a command goes on from: looked at before anything heavy loads, and said in one line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.errors import InputError
from tulu_lightning.models.saved import Header, header_of, step_of

__all__ = ["ACCEPT_HELP", "CKPT_HELP", "changes", "header_for", "start_line", "tell_checkpoints"]

CKPT_HELP = (
    "where to go on: auto (the newest checkpoint of the run folder, or a fresh start if there is none), last (the "
    "newest; an error if there is none), none (the start weights; refused over a run that got somewhere), or the path of "
    "a checkpoint, file or folder, of any number of ranks"
)
ACCEPT_HELP = (
    "settings that may differ from those the run was started with, by the names that the refusal gives, with commas "
    "between: optimizer.lr,data.seed. What does not change the mathematics may change without"
)
NOT_OF_THE_RUN = ("config", "ckpt_path", "accept_changes", "weights_only", "include")
"""What a start is told, not what a run is: no change worth telling."""
UNSET = "(not set)"
SHOWN = 60
"""Characters of a value in the line that says what has changed."""


def header_for(checkpoint: str | None, stage: str) -> Header | None:
    """What a checkpoint says of itself, once it is known to be whole and of this stage; no weights are loaded.

    Args:
        checkpoint: its path, or a name that Lightning resolves.
        stage: name of the stage's class.

    Raises:
        InputError: it is damaged, half written, of a newer format, or of another stage.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    header = header_of(checkpoint)
    if header is not None and header.stage != stage:
        what = f"is a checkpoint of {header.stage}, and the config is of {stage}"
        raise InputError(checkpoint, what, f"Give one of {stage}, or another run folder (trainer.default_root_dir).")
    return header


def tell_checkpoints(
    callbacks: Sequence[Checkpoints],
    config: dict[str, Any],
    checkpoint: str | None,
    header: Header | None,
    accepted: str | Sequence[str] | None,
) -> None:
    """What the callback that saves must know: the config, what the run goes on from, and what may differ from it."""
    names = accepted.split(",") if isinstance(accepted, str) else accepted or []
    for callback in callbacks:
        callback.config = config
        callback.resumes = None if header is None or checkpoint is None else (checkpoint, header)
        callback.accept_changes += [name.strip() for name in names if name.strip()]


def start_line(
    command: str, checkpoint: str | None, header: Header | None, config: Mapping[str, Any], run: Path
) -> str:
    """What a command starts from, at which step, and which settings have changed since.

    Args:
        command: `fit` and so on.
        checkpoint: what it goes on from; None is nothing.
        header: what that says of itself.
        config: the present config.
        run: the run folder.
    """
    if checkpoint is None:
        start = "starting fresh" if command == "fit" else "with the start weights"
        return f"{command}: {start}, run folder {run}"
    step = step_of(checkpoint) if header is None else header.step
    done = "" if step is None else f" (step {step})"
    changed = changes(header.config, config) if header is not None and header.config and command == "fit" else []
    since = f"; changed since: {', '.join(changed)}" if changed else ""
    return f"{command}: {'resuming from' if command == 'fit' else 'using'} {checkpoint}{done}{since}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs, as `key: old -> new`, keys dotted; long values are cut."""
    one, other = (
        dict(_leaves({key: value for key, value in config.items() if key not in NOT_OF_THE_RUN}))
        for config in (before, now)
    )
    keys = [key for key in {**one, **other} if one.get(key, UNSET) != other.get(key, UNSET)]
    return [f"{key}: {_short(one.get(key, UNSET))} -> {_short(other.get(key, UNSET))}" for key in keys]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _short(value: Any) -> str:
    text = value if value is UNSET else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
