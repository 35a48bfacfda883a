"""A worker of the scoring pool: one verifier call after the other, for as long as its connection lasts."""

import json
import os
import pickle
import socket
import sys
from typing import Any

from tulu_lightning.rollout.pool_system import end_children, has_children, read_frame, write_frame

__all__ = ["load", "serve"]

MANY = 20
"""Modules imported by a call that are worth having in the process that workers are forked from."""


def serve(connection: socket.socket) -> None:
    """Answer calls until the other side closes.

    A call is a pickled (pickled verifier, response, target). An answer is JSON, because whoever reads it trusts no
    worker: `[outcome, score, trouble, modules]`, where the outcome may also be `unusable` (the verifier cannot be loaded
    here), and the modules are those that the call had to import, if they were many.
    """
    known: dict[bytes, Any] = {}
    loaded = set(sys.modules)
    while (frame := read_frame(connection)) is not None:
        answer = _answer(frame, known)
        if has_children():
            end_children()
        imported: list[str] = []
        if len(sys.modules) - len(loaded) >= MANY:
            imported = [name for name in sys.modules if name not in loaded]
            loaded.update(imported)
        write_frame(connection, json.dumps([*answer, imported]).encode())
        if answer[2].startswith("MemoryError"):  # what is left of the memory may not be enough for the next call
            os._exit(0)


def load(pickled: bytes, known: dict[bytes, Any]) -> Any:
    """The verifier, unpickled once."""
    if pickled not in known:
        known[pickled] = pickle.loads(pickled)
    return known[pickled]


def _answer(frame: bytes, known: dict[bytes, Any]) -> tuple[str, float, str]:
    pickled, response, target = pickle.loads(frame)
    try:
        verifier = load(pickled, known)
    except Exception as error:
        return "unusable", 0.0, f"{type(error).__name__}: {error}"
    try:
        outcome, score = verifier(response, target)
        return str(outcome), float(score), ""
    except MemoryError:
        return "timeout", 0.0, "MemoryError: over the memory limit"
    except Exception as error:
        return "error", 0.0, f"{type(error).__name__}: {error}"[:500]
