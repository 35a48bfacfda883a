"""What every stage adds to a checkpoint, and what it asks of one before it goes on."""

from typing import Any

from torch import Tensor

from tulu_lightning.checkpoints.identity import check_run
from tulu_lightning.errors import InputError
from tulu_lightning.models.saved import check_names
from tulu_lightning.stages.checks import reopen_epoch

__all__ = ["restore", "save"]

KEY = "tulu_stage"


def save(stage: Any, checkpoint: dict[str, Any]) -> None:
    """The step counter, what is counted over steps in a row, the engine's version, and what the run is."""
    own = {"step": stage.step, "skipped": stage.skipped, "class": type(stage).__name__, "identity": stage.identity()}
    if (watchman := getattr(stage, "watchman", None)) is not None:
        own["watchman"] = watchman.state()
    if (engine := getattr(stage, "engine", None)) is not None:
        own["engine version"] = engine.version
    checkpoint[KEY] = own


def restore(stage: Any, checkpoint: dict[str, Any]) -> None:
    """Go on at the step that was finished.

    Raises:
        InputError: the checkpoint is another stage's or another model's; or, when training, the run's settings are not
            those it was started with.
    """
    state = checkpoint.get(KEY, {})
    if state.get("class") != type(stage).__name__:
        what = f"is a checkpoint of {state.get('class')}"
        raise InputError("ckpt_path", what, f"Give one of {type(stage).__name__}.")
    if stage._trainer is not None and stage._trainer.state.fn == "fit":
        check_run("ckpt_path", state.get("identity", {}), stage, say=True)
        reopen_epoch(checkpoint)
    if "state_dict" in checkpoint:  # a sharded strategy has looked, and loaded, by itself
        saved, built = (_shapes(tensors) for tensors in (checkpoint["state_dict"], stage.state_dict()))
        check_names("ckpt_path", saved, built)
    stage.step, stage.skipped = state["step"], state["skipped"]
    if "watchman" in state:
        stage.watchman.restore(state["watchman"])


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
