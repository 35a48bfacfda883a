"""The reward of benchmarks/rlvr.py: half of all responses are right, so that almost every group has something to learn.

With a real task and a small model most groups are all wrong, which costs one side nothing and another its full price.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict


@dataclass(frozen=True)
class Coin:
    """Right when the checksum of the response's text is even."""

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        right = zlib.crc32(response.encode("utf-8", "surrogatepass")) % 2 == 0
        return Verdict("right", 1.0) if right else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        return None
