"""Weights on their way to an engine that is not ours: what must arrive, what was sent, and what came of it.

Names and shapes are those of the transformers model, so what a trainer sends is checked before the other side sees it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tulu_lightning.errors import InputError
from tulu_lightning.models.limits import read_config
from tulu_lightning.models.lora import Lora, adapt, adapter_weights
from tulu_lightning.models.weights import full
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.fingerprint import mark

__all__ = ["Contents", "Delivery", "contents_of", "dtype_of", "joined"]


class Contents(NamedTuple):
    """What the state dict of a model folder's architecture holds."""

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    """Names that are a second name of another tensor: `lm_head.weight` -> `model.embed_tokens.weight`."""
    vocabulary: int
    positions: float
    """Tokens that the model has positions for; infinite if its config does not say."""

    def complete(self, found: Mapping[str, str]) -> dict[str, str]:
        """Marks under all names, from those of an engine that may know a tied tensor by one name only, and that knows none of
        what is cut over its workers."""
        known = {name: name if name in found else self.tied.get(name, name) for name in self.shapes}
        return {name: found[own] for name, own in known.items() if own in found}


def contents_of(folder: str | Path, lora: Lora | None = None) -> Contents:
    """Contents of a model folder, by its config; no weights are read.

    Args:
        folder: config of the model.
        lora: given, the adapters alone have to arrive, and nothing of the base.

    Raises:
        InputError: the config does not load, or a target of the adapters is not there.
    """
    config = read_config(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    text: Any = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or float("inf")
    if lora is not None:
        adapt(model, lora, str(folder))
        return Contents({n: tuple(x.shape) for n, x in adapter_weights(model)}, {}, text.vocab_size, positions)
    first, tied = dict[int, str](), dict[str, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied[name] = original
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Contents(shapes, tied, text.vocab_size, positions)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype that weights may have in an engine, from itself or its name.

    Raises:
        InputError: it is neither float32 nor bfloat16.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16):
        raise InputError("engine.dtype", f"it is {dtype}", "Use float32 or bfloat16.")
    return found


def joined(answers: Sequence[Any]) -> Any:
    """What the workers of one engine say together: of their reports on a refresh whatever any of them found, else the first."""
    first = answers[0]
    if not isinstance(first, dict) or "received" not in first:
        return first
    names = dict.fromkeys(name for answer in answers for name in answer["received"])
    marks = {name: {answer["received"].get(name) for answer in answers} for name in names}
    result: dict[str, Any] = {
        "received": {name: found.pop() if len(found) == 1 else "by worker" for name, found in marks.items()}
    }
    for kind in ("differ", "unproved"):
        result[kind] = list(dict.fromkeys(name for answer in answers for name in answer[kind]))
    return result


class Delivery:
    """One refresh: iterate over it to send, then `settle` with what the other side says.

    Every tensor is gathered if it is sharded (one at a time; all ranks must iterate), cast to the engine's dtype and
    marked. Of tied tensors one is sent, under its first name; the others are only compared with it. A tensor of an
    unknown name or another shape is not sent: it would break the other side's loading in the middle.

    Args:
        contents: what must arrive.
        dtype: of the engine.
        named: the sender's tensors.
    """

    def __init__(self, contents: Contents, dtype: torch.dtype, named: Iterable[tuple[str, Tensor]]) -> None:
        self._contents, self._dtype, self._named = contents, dtype, named
        self._sent, self._given = dict[str, str](), dict[str, str]()
        self._unknown, self._shapes = list[str](), list[str]()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._named:
            whole = full(tensor.detach())
            shape = self._contents.shapes.get(name)
            if shape is None:
                self._unknown.append(name)
            elif tuple(whole.shape) != shape:
                self._shapes.append(f"{name} {tuple(whole.shape)} for {shape}")
            else:
                value = whole.to(self._dtype) if whole.is_floating_point() else whole
                self._given[name] = mark(value)
                original = self._contents.tied.get(name, name)
                if original not in self._sent:
                    self._sent[original] = self._given[name]
                    yield original, value

    def complete(self) -> list[tuple[str, Tensor]]:
        """All tensors at once, for those who cannot send a part.

        Raises:
            RefreshError: some are missing, unknown or of another shape.
        """
        sent = list(self)
        self.settle(self.marks())
        return sent

    def problems(
        self, received: Mapping[str, str], differ: Iterable[str] = (), expected: Mapping[str, str] | None = None
    ) -> dict[str, list[str]]:
        """What went wrong, as `RefreshError` lists it.

        Args:
            received: marks that the other side took of what arrived.
            differ: tensors that it holds in another form than they arrived.
            expected: the sender's own marks, taken before the first step of the way.
        """
        shapes, tied = self._contents.shapes, self._contents.tied
        now = self.marks()
        return {
            "not delivered": [name for name in shapes if name not in tied and name not in self._sent],
            "unknown": self._unknown,
            "of another shape": self._shapes,
            "changed on the way": [name for name, word in self._sent.items() if received.get(name) != word],
            "not held as sent": [
                *(name for name, word in self._given.items() if now[name] != word),  # tied, but sent different
                *(name for name in differ if name not in tied or tied[name] in self._sent),
            ],
            "not held as expected": [name for name, word in (expected or {}).items() if now.get(name) != word],
        }

    def settle(
        self, received: Mapping[str, str], differ: Iterable[str] = (), expected: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The marks of what is held now, under all names.

        Raises:
            RefreshError: see `problems`.
        """
        problems = self.problems(received, differ, expected)
        if any(problems.values()):
            raise RefreshError(problems)
        return self.marks()

    def marks(self) -> dict[str, str]:
        """Marks of what was sent, tied names included."""
        tied = self._contents.tied
        names = (name for name in self._contents.shapes if tied.get(name, name) in self._sent)
        return {name: self._sent[tied.get(name, name)] for name in names}
