"""A loader whose items are whole steps and whose only state is the number of the next one."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["StepLoader"]


class _StepsFrom(Sampler[int]):
    """Step numbers from `start` on."""

    def __init__(self, total: int) -> None:
        self.total, self.start = total, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        # The whole run, not what is left of it: Lightning resumes its own batch counter and compares it with this.
        # Without a length it would fetch one batch ahead, which a resumed run would then miss.
        return self.total


class StepLoader(DataLoader):
    """Yields `dataset[step]` for every step of the run, which is one Lightning epoch.

    What a step holds is the data set's business, as a pure function of its number; so going on at step k is all that
    resuming takes. Lightning saves and restores this state with its checkpoints.
    """

    def __init__(self, dataset: Dataset, total: int, num_workers: int = 0) -> None:
        """Start at step 0.

        Args:
            dataset: indexed by step.
            total: steps of the whole run.
            num_workers: processes that prepare steps ahead; 0 prepares them in this one.
        """
        self._steps = _StepsFrom(total)
        self._next = 0
        super().__init__(dataset, batch_size=None, sampler=self._steps, collate_fn=_as_is, num_workers=num_workers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Steps from the restored one on, or from 0."""
        self._next = self._steps.start
        for item in super().__iter__():
            self._next += 1  # counts what was handed out, so steps that workers hold ready do not matter
            yield item

    def state_dict(self) -> dict[str, int]:
        """The number of the step that comes next."""
        return {"step": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self._steps.start = self._next = state["step"]


def _as_is(item: Any) -> Any:
    """Instead of torch's default, which would turn the tuples of a pack into lists."""
    return item
