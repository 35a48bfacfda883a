"""Which rows of each source were kept, which were left out, and why."""

from collections import Counter

from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

__all__ = ["Intake", "LeftOut"]


class LeftOut(Exception):
    """Raised while a row is read, to leave it out; its text is the reason that the table shows."""


class Intake:
    """Counts of a mixture, by source and reason."""

    def __init__(self, sources: list[Source]) -> None:
        """Start with nothing read.

        Raises:
            InputError: no source, or two of one name.
        """
        if not sources:
            raise InputError("data.sources", "there is no source", "Give at least one.")
        twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
        if twice:
            raise InputError("data.sources", f"two sources are called {twice[0]!r}", "Give each its own name.")
        self.kept: Counter[str] = Counter({source.name: 0 for source in sources})
        self.left_out: dict[str, Counter[str]] = {source.name: Counter() for source in sources}

    def keep(self, source: Source) -> None:
        """Count a row that is used."""
        self.kept[source.name] += 1

    def leave_out(self, source: Source, reason: str) -> None:
        """Count a row that is not."""
        self.left_out[source.name][reason] += 1

    def check(self, source: Source) -> None:
        """Refuse a source that gives nothing.

        Raises:
            InputError: every row of it was left out.
        """
        if not self.kept[source.name]:
            where = f"source {source.name!r}"
            remedy = "Raise the limit or correct the rows, or leave the source out."
            raise InputError(where, f"every row was left out ({self._reasons(source.name)})", remedy)

    def table(self) -> str:
        """One line a source if any row was left out, otherwise empty."""
        if not any(self.left_out.values()):
            return ""
        width = max(map(len, self.kept))
        lines = [
            f"  {name:<{width}}  {kept:>8} kept  {self.left_out[name].total():>8} left out  {self._reasons(name)}".rstrip()
            for name, kept in self.kept.items()
        ]
        return "\n".join(["rows by source:", *lines])

    def _reasons(self, name: str) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out[name].items()))
