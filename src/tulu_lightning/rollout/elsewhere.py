"""What stands on a rank for an engine that is on another one."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from tulu_lightning.rollout.engine import Health
from tulu_lightning.types import Completion, Sampling

__all__ = ["Elsewhere"]


class Elsewhere:
    """Follows the other rank's engine: takes part in gathering weights, knows their version, and samples nothing.

    Args:
        version: of the weights that the engine holds.
    """

    def __init__(self, version: int) -> None:
        self.version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int, **_: object
    ) -> list[list[Completion]]:
        """Never called: the rank with the engine samples."""
        raise RuntimeError("the engine is on another rank")

    def refresh(
        self, named: Iterable[tuple[str, Tensor]], version: int, *, expected: Mapping[str, str] | None = None
    ) -> None:
        """Iterate: sharded weights are gathered by all ranks together."""
        for _ in named:
            pass
        self.version = version

    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Never called, as `generate`."""
        raise RuntimeError("the engine is on another rank")

    def health(self) -> Health:
        """Says where to ask."""
        return Health(True, self.version, "the engine is on another rank")

    def fingerprint(self) -> dict[str, str]:
        """Nothing is held here."""
        return {}

    def close(self) -> None:
        """Nothing is held here."""
