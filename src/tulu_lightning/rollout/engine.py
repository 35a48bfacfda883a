"""What every rollout engine does, whatever runs it: sample, take new weights, and prove that it holds them.

The order of a training step is: the trainer calls `refresh` with its weights and the number of its step, then
`generate`. An engine that cannot prove a refresh raises `RefreshError` and refuses to sample until one succeeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tulu_lightning.errors import RunStopped
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.types import Completion, Sampling

__all__ = ["Engine", "EngineError", "Health", "Made", "Progress", "RefreshError"]

Progress = Callable[[int, int], None]
"""Called with (finished rows, all rows) as rows finish."""
Made = Callable[[int, Sequence[Completion]], None]
"""Called with a prompt's place and all of its completions when the last of them is there."""


class Health(NamedTuple):
    """What an engine says of itself."""

    alive: bool
    version: int
    detail: str
    """For people: which engine, where, and what is wrong with it if it is not alive."""


class EngineError(RunStopped):
    """The engine died or does not answer: a process that ended, a connection refused, a wait that went over its time.

    The step that met it has trained nothing yet, so it can be done again on a restarted engine. The message names who
    waited for whom, for how long.
    """


class RefreshError(RuntimeError):
    """The engine does not hold the weights that it was sent.

    Args:
        problems: per kind of fault ("not delivered", "differ from what was sent", ...) the names of the tensors.
    """

    def __init__(self, problems: Mapping[str, Sequence[str]]) -> None:
        self.problems = {kind: tuple(names) for kind, names in problems.items() if names}
        parts = (f"{kind}: {_some(names)}" for kind, names in self.problems.items())
        super().__init__("weight refresh failed, the engine will not sample. " + "; ".join(parts))


def _some(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class Engine(Protocol):
    """Samples from a copy of the policy. All ranks call `refresh`; each rank may generate its own prompts."""

    @property
    def version(self) -> int:
        """Version of the weights held; -1 after a refresh that failed."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
        made: Made | None = None,
        stop_texts: StopTexts | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt; result[i][j] is sample j of prompt i.

        Args:
            prompts: token ids.
            n: samples per prompt.
            sampling: length, temperature, stop ids.
            seed: the randomness of sample j of prompt i depends on (seed, keys[i], j) and on nothing else.
            keys: what each prompt is called in its seed; its place in `prompts` if left out. A rank that takes a share
                of a step's prompts gives their places in the step, and samples what one machine would have.
            progress: see `Progress`.
            made: see `Made`; for those who keep each answer as soon as they can. An engine that knows of none before all
                are there (vLLM in this process) calls it then.
            stop_texts: texts that end a sample, besides `sampling.stop_ids`; its `finish` is then "stop", too.

        Raises:
            InputError: an empty prompt, a token that the model does not know, or more tokens than it has positions.
            RuntimeError: the last refresh failed, or the weights give no finite probabilities.
        """
        ...

    def refresh(
        self, named: Iterable[tuple[str, Tensor]], version: int, *, expected: Mapping[str, str] | None = None
    ) -> None:
        """Take new weights, by the names of the Hugging Face state dict, and prove that they are held.

        Args:
            named: all tensors; of tied ones, one is enough.
            version: stamp for the completions that these weights make.
            expected: the sender's own fingerprint, taken before transport, to check against what is held.

        Raises:
            RefreshError: tensors missing, unknown, of another shape, or not equal after the copy.
        """
        ...

    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Log-probs of given tokens under the weights held: the canary of a refresh.

        Args:
            sequences: (prompt, response) token ids; neither is empty.
            temperature: what logits are divided by.

        Returns:
            For each sequence float32 `[L]`, on the host: one per response token, in nats.
        """
        ...

    def health(self) -> Health:
        """Whether the engine can sample now; never raises, and answers within seconds."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What the engine holds: dtype, shape and checksum of each tensor (see `rollout.fingerprint`)."""
        ...

    def close(self) -> None:
        """Give the memory back; no other call may follow."""
        ...
