"""The best validation of a run so far, kept on disk so that a resumed run knows it."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tulu_lightning.checkpoints.promoted import export_folder
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.files import write_whole

__all__ = ["Best"]

NAME = "best.json"


class Best:
    """Follows one validation metric.

    The export of an earlier best stays until the run has ended: a kill may take the run back to before the later one.

    Args:
        metric: as the stage logs it, e.g. `val_accuracy`.
        mode: whether the highest or the lowest value is the best.
    """

    def __init__(self, metric: str, mode: Literal["max", "min"]) -> None:
        self.metric, self.mode = metric, mode
        self.values: dict[int, float] = {}
        self._exported: set[int] = set()

    @property
    def found(self) -> tuple[int, float] | None:
        """(step, value) of the best validation whose weights were exported; of equal ones the first."""
        sign = 1 if self.mode == "max" else -1
        steps = sorted(self._exported & set(self.values))
        return max(((step, self.values[step]) for step in steps), key=lambda found: sign * found[1], default=None)

    def start(self, run: Path) -> None:
        """Read what an earlier start of the run has found."""
        if (path := run / NAME).exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["metric"] == self.metric:
                self.values = {int(step): value for step, value in kept["values"].items()}
                self._exported = {step for step in self.values if export_folder(run, step).is_dir()}

    def value_in(self, metrics: Mapping[str, Any]) -> float:
        """The metric's value.

        Raises:
            InputError: the stage does not log it.
        """
        if self.metric not in metrics:
            known = [name for name in metrics if name.startswith("val_")]
            raise InputError(
                "Promote.best", f"is {self.metric!r}, which no validation gives", nearest(self.metric, known)
            )
        return float(metrics[self.metric])

    def improves(self, value: float, step: int) -> bool:
        """Whether the weights after this step are to be exported; then they count as such."""
        sign = 1 if self.mode == "max" else -1
        self.values.pop(step, None)
        best = self.found
        better = math.isfinite(value) and (best is None or sign * value > sign * best[1])
        if better:
            self._exported.add(step)
        return better

    def keep(self, run: Path, step: int, value: float) -> None:
        """Write the values so far."""
        self.values[step] = value
        shown = {step: value for step, value in sorted(self.values.items()) if math.isfinite(value)}
        write_whole(run / NAME, json.dumps({"metric": self.metric, "mode": self.mode, "values": shown}, indent=1))

    def reason(self) -> str:
        """Why the best is promoted, for the record."""
        assert self.found is not None
        step, value = self.found
        which = "highest" if self.mode == "max" else "lowest"
        count = len(self.values)
        of = f"the {which} of {count} validations" if count > 1 else "of the only validation"
        return f"{self.metric} is {value:.4f} at step {step}, {of}; whether others differ by chance was not tested"

    def drop_others(self, run: Path) -> None:
        """Remove exports of what was the best for a while."""
        for step in self._exported - {self.found[0] if self.found else -1}:
            shutil.rmtree(export_folder(run, step), ignore_errors=True)
