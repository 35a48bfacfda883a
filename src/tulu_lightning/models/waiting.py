"""Ranks that watch each other: one that fails ends all of them, soon and by name, and a wait that is too long says for whom.

A rank that dies leaves the others in a collective: gloo notices after a while and names an address; NCCL waits. A rank
that hangs leaves them there until a timeout that names nobody. So every rank has a thread here that talks to the others
through a key-value store of its own connection:

| what happens | what the ranks do |
|---|---|
| a rank raises | it says so first, then the others end |
| a rank is gone (killed, out of memory) | another process of its machine notices within seconds, and all end |
| a machine is gone | the next rank misses its sign of life for `SILENCE` seconds, and all end |
| torchrun on a machine is gone, but not its ranks | they notice within seconds, and all end |
| a rank does not come to a collective | after `timeout` seconds of waiting each says where it stands, and all end |

Ending means by itself if the main thread can, and else by `os._exit`: a thread that waits in a collective cannot be woken.
"""

import os
import socket
import sys
import threading
import time
from typing import Any

from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from tulu_lightning.models.failures import Failure, first_line, of_the_connection, say, too_long
from tulu_lightning.models.standing import Standing, gone, namespace

__all__ = ["Watch"]

POLL = 1.0
"""Seconds between two looks at the others."""
GRACE = 10.0
"""Seconds that a rank has to end by itself once another one has failed; its last save or message may be on the way."""
SILENCE = 120.0
"""Seconds without a sign of life after which a rank on another machine is given up."""


STORELESS = Failure((), "the process that holds the ranks' store is gone (rank 0, or its torchrun)")


class Watch:
    """The thread of one rank. It lives from `start` to `done`, or to the end of the process after a failure.

    Args:
        store: one that every rank reaches.
        rank: this one.
        world: how many there are.
        timeout: seconds for which a rank may wait for the others.
        round: of this process; a trainer's every run has one, the same on all ranks.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float, round: int = 0) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._store: Any = PrefixStore(f"watch/{round}", store.clone())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._main = Standing()
        self._others: dict[int, list[str]] = {}
        self._beats = 0
        self._heard: tuple[str, float] = ("", time.monotonic())
        self._lost: float | None = None
        self._raised = False
        self._told_at: float | None = None
        self._answered = False
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def start(self) -> None:
        """Begin to watch."""
        mine = (socket.gethostname(), namespace(), str(os.getpid()))
        self._store.set(f"who/{self.rank}", "\n".join(mine))
        threading.Thread(target=self._run, name="watch over the ranks", daemon=True).start()

    def done(self) -> None:
        """End without a failure: from now on this rank may leave."""
        self._stop.set()
        try:
            with self._lock:
                self._store.set(f"beat/{self.rank}", "done")
        except RuntimeError:
            pass  # the store's host was done before

    # A rank that raises ------------------------------------------------------------------------------------------

    def raised(self, error: BaseException) -> Failure | None:
        """This rank's main thread leaves by an exception: tell the others, unless one of them is why.

        Returns:
            The failure of another rank that this one follows from; None if it is this rank's own.
        """
        self._raised = True
        text = first_line(error)
        try:
            # The one that failed told it before it left. One that was killed told nothing: it takes a look.
            deadline = time.monotonic() + (3 * POLL if of_the_connection(error) else 0)
            while True:
                with self._lock:
                    self._look_at_neighbours()
                    failure = self._failure()
                if failure is not None or time.monotonic() >= deadline:
                    break
                time.sleep(POLL / 4)
            failure = failure or self._blame(Failure((self.rank,), text))
        except RuntimeError:  # the store is gone, and if that is why, what happened there was said there
            return STORELESS if of_the_connection(error) else None
        return None if self.rank in failure.ranks else failure

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(POLL):
            self._main.look()
            try:
                if self._lost is None:
                    with self._lock:
                        self._look()
            except RuntimeError:  # DistNetworkError, DistStoreError
                self._lost = time.monotonic()
            if self._lost is None:
                continue
            if (orphan := self._orphaned()) is not None:
                self._leave(orphan)
            if min(self._main.waits, time.monotonic() - self._lost) > GRACE:
                self._leave(STORELESS)

    def _look(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", str(self._beats))
        failure = self._failure()
        if failure is None:
            if (orphan := self._orphaned()) is not None:
                self._blame(orphan)
            self._look_at_neighbours()
            self._listen()
            if self._main.waits > self.timeout and not self._raised:
                self._store.compare_set("ask", "", str(self.rank))
            if self._store.check(["ask"]):
                self._answer()
            failure = self._failure()
        if failure is not None:
            self._follow(failure)

    def _follow(self, failure: Failure) -> None:
        """End with the others, unless the main thread is about to."""
        now = time.monotonic()
        self._told_at = self._told_at or now
        if self._raised:
            if self._main.waits > GRACE:  # in a collective to which nobody comes any more
                self._leave(failure)
        elif now - self._told_at >= (0 if self.rank in failure.ranks else GRACE):
            self._leave(failure)

    def _leave(self, failure: Failure) -> None:
        if self.rank in failure.ranks:
            say(f"rank {self.rank} of {self.world} ends: {failure.text}\n{self._main.stack()}")
        elif self.speaks():
            say(self.ends(failure))
        sys.stdout.flush()
        os._exit(1)

    # Failures ----------------------------------------------------------------------------------------------------

    def ends(self, failure: Failure) -> str:
        """For a message: that this rank ends because of others."""
        return f"rank {self.rank} of {self.world} ends: {failure.text}"

    def speaks(self) -> bool:
        """Whether this is the first rank of its machine: one line a machine is enough."""
        mine = self._others.get(self.rank)
        return all(other[:1] != (mine or [""])[:1] for rank, other in self._others.items() if rank < self.rank)

    def _failure(self) -> Failure | None:
        if not self._store.check(["failed"]):
            return None
        ranks, text = self._store.get("failed").decode().split("\n", 1)
        return Failure(tuple(int(rank) for rank in ranks.split()), text)

    def _blame(self, failure: Failure) -> Failure:
        """Make it the run's failure; the first one stays."""
        text = failure.text
        if failure.ranks == (self.rank,) and not text.startswith(f"rank {self.rank} failed: "):
            text = f"rank {self.rank} failed: {text}"
        self._store.compare_set("failed", "", f"{' '.join(map(str, failure.ranks))}\n{text}")
        return self._failure() or failure

    def _orphaned(self) -> Failure | None:
        """A rank whose torchrun was killed would train on, and nobody could end it or start it again."""
        if self._agent is None or os.getppid() == self._agent:
            return None
        what = f"its torchrun (process {self._agent} on {socket.gethostname()}) is gone"
        return Failure((self.rank,), f"rank {self.rank} failed: {what}")

    def _look_at_neighbours(self) -> None:
        """Find processes of this machine that are gone."""
        if not self._others:
            keys = [f"who/{rank}" for rank in range(self.world)]
            if not self._store.check(keys):
                return
            values = (value.decode().split("\n") for value in self._store.multi_get(keys))
            self._others = dict(enumerate(values))
        mine = self._others[self.rank]
        for rank, (host, space, pid) in self._others.items():
            if rank != self.rank and [host, space] == mine[:2] and gone(int(pid)) and not self._is_done(rank):
                why = "killed, perhaps for want of memory, or it left without a word"
                self._blame(Failure((rank,), f"rank {rank} (process {pid} on {host}) is gone: {why}"))
                return

    def _listen(self) -> None:
        """Miss the next rank's signs of life."""
        other = (self.rank + 1) % self.world
        key, now = f"beat/{other}", time.monotonic()
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        if beat != self._heard[0]:
            self._heard = (beat, now)
        elif beat != "done" and now - self._heard[1] > SILENCE:
            where = f" on {self._others[other][0]}" if other in self._others else ""
            text = (
                f"rank {other}{where} has given no sign of life for {SILENCE:.0f} s: its machine is gone, or it hangs"
            )
            self._blame(Failure((other,), text))

    def _is_done(self, rank: int) -> bool:
        key = f"beat/{rank}"
        return self._store.check([key]) and self._store.get(key) == b"done"

    # A wait that is too long -------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Say where this rank stands; the one that asked collects the answers."""
        if not self._answered:
            self._answered = True
            self._store.set(f"place/{self.rank}", f"{int(self._main.waits > POLL)}\n{self._main.place()}")
        if self._store.get("ask") != str(self.rank).encode():
            return
        deadline = time.monotonic() + 5 * POLL
        places: dict[int, list[str]] = {}
        while len(places) < self.world and time.monotonic() < deadline:
            for rank in set(range(self.world)) - set(places):
                if self._store.check([f"place/{rank}"]):
                    places[rank] = self._store.get(f"place/{rank}").decode().split("\n", 1)
            time.sleep(POLL / 10)
        self._blame(too_long(places, self.world, self.timeout))
