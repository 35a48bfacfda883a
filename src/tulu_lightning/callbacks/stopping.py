"""How a run stops when it is asked to: the step in progress is finished, all ranks agree, and it is saved."""

import signal
import threading
from contextlib import suppress
from typing import Any

__all__ = ["Stopping"]

ASKS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes a machine back. They may come twice, and never stop a run at once."""


class Stopping:
    """Takes signals over while a run trains.

    Attributes:
        requested: this rank was asked to stop.
        preempted: by a scheduler, not by Ctrl-C.
    """

    def __init__(self) -> None:
        self.requested = self.preempted = False
        self._speaks = True
        self._previous: dict[int, Any] = {}

    def take_over(self, speaks: bool) -> None:
        """Set the handlers; after Lightning, whose own would run collectives inside a handler.

        Args:
            speaks: whether this rank says so when it is asked to stop.
        """
        self.requested = self.preempted = False
        self._speaks = speaks
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *ASKS):
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.requested and not self.preempted:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, True
        self.preempted |= number in ASKS
        if first and self._speaks:
            again = " (again to stop at once)" if number == signal.SIGINT else ""
            with suppress(RuntimeError):  # the signal came in the middle of another print
                print(f"\nstopping: finishing this step and saving it{again}", flush=True)

    def agreed(self, strategy: Any) -> bool:
        """Whether any rank was asked; a collective, after the same step on all of them."""
        if not strategy.reduce_boolean_decision(self.requested, all=False):
            return False
        self.requested = True
        self.preempted = strategy.reduce_boolean_decision(self.preempted, all=False)
        return True

    def give_back(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
