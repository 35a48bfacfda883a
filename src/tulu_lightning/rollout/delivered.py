"""What both vLLM engines do alike: know what they hold, take new weights with proof, and refuse to sample without it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tulu_lightning.models.lora import Lora
from tulu_lightning.rollout.delivery import Contents, Delivery
from tulu_lightning.rollout.engine import RefreshError

__all__ = ["DeliveredEngine"]


class DeliveredEngine:
    """Weights and their version; where vLLM runs, and how it is reached, is the subclass's.

    Args:
        contents: of the model.
        dtype: of the weights.
        version: of the weights; -1 before the first refresh of an engine that holds no known ones.
        proof_columns: columns of each matrix that a refresh reads back; 0 for all.
        positions: prompt and new tokens that a sample may have together.
        lora: of engines whose base stays, and that are sent adapters alone (`contents` lists those then). Until the first push
            they sample from the base: adapters start as nothing.
    """

    def __init__(
        self,
        contents: Contents,
        dtype: torch.dtype,
        version: int,
        proof_columns: int,
        positions: float,
        lora: Lora | None = None,
    ) -> None:
        self._contents, self._dtype, self._lora = contents, dtype, lora
        self._version, self._columns = version, proof_columns
        self._positions = positions
        self._marks: dict[str, str] | None = None

    def _carry(self, delivery: Delivery, version: int) -> tuple[Mapping[str, Any], bool]:
        """Bring the weights to vLLM and empty its prefix cache: its report, and whether the cache was emptied."""
        raise NotImplementedError

    def _read_marks(self) -> dict[str, str]:
        """Marks of what vLLM's layers hold, tied names left out."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """Version of the weights held; -1 after a refresh that failed."""
        return self._version

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._dtype

    @property
    def positions(self) -> int:
        """Prompt and new tokens that a sample may have together."""
        return int(self._positions)

    def distrust(self) -> None:
        """Refuse to sample until the next refresh: a proof outside the engine has failed."""
        self._version = -1

    def refresh(
        self, named: Iterable[tuple[str, Tensor]], version: int, *, expected: Mapping[str, str] | None = None
    ) -> None:
        """See `Engine.refresh`; `expected` is `fingerprint.fingerprint(named, engine.dtype)` on the sender's side.

        Raises:
            RefreshError: as there.
            EngineError: vLLM is a server, and it died or did not take the weights in time.
        """
        self._version, self._marks = -1, {}  # until proven
        delivery = Delivery(self._contents, self._dtype, named)
        report, emptied = self._carry(delivery, version)
        marks = delivery.settle(report["received"], report["differ"], expected)
        if not emptied:
            raise RefreshError({"prefix cache": ["not emptied: requests are running"]})
        self._version, self._marks = version, marks

    def fingerprint(self) -> dict[str, str]:
        """Marks of the tensors that were delivered last and are proved to be held.

        Before the first refresh they are read out of the layers. Then a zero's sign is lost: its mark may differ from
        the folder's. Of adapters there are none then.
        """
        if self._marks is None:
            self._marks = {} if self._lora is not None else self._contents.complete(self._read_marks())
        return dict(self._marks)

    def _check_held(self) -> None:
        if self._version < 0:
            raise RuntimeError(
                "the last weight refresh failed or never came: the engine holds no known weights to sample from"
            )
