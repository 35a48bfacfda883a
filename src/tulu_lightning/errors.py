"""The errors that a user is meant to read.

Everything that is wrong with what the user gave (a config, a file, a row, a folder) is raised as `InputError`
before anything heavy runs. The command line prints its text on one line and exits with status 2; from a notebook
it is an ordinary `ValueError`.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: says where it is, what was found there, and what would do.

    Args:
        where: the file, row, key or folder that is wrong, e.g. `data.jsonl, row 17`.
        what: what is wrong there, with the value received.
        remedy: what would do instead, as an instruction.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = where, what, remedy
        super().__init__(f"{where}: {what}. {remedy}")


class RunStopped(RuntimeError):
    """A run that stopped itself because going on would be of no use; the same command goes on from its checkpoint.

    The message says what was found, in numbers, and what to try. The command line prints it on one line and exits with
    status 1.
    """


class Preempted(KeyboardInterrupt):
    """The machine is wanted back (SIGTERM, SIGUSR1): what was computed is saved, and the same command goes on.

    The command line exits with status 75, which says "try again later" to whoever started it. Like Ctrl-C it passes by
    what only handles errors.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """A remedy that offers the nearest of the known names, or lists them all."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
