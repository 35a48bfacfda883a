"""What `tulu doctor` found, one finding a line."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["Finding", "failed_import", "lines"]

State = Literal["ok", "off", "warn", "fails"]


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        part: the heading it stands under.
        name: what was looked at.
        state: ok; off, something optional that is not there; warn, something that will be noticed; fails, something
            without which the demo does not run.
        text: what was found.
        remedy: what to do about it, an instruction; empty where there is nothing to do.
    """

    part: str
    name: str
    state: State
    text: str
    remedy: str = ""


def failed_import(part: str, name: str, error: BaseException, remedy: str) -> Finding:
    """A package that is there and does not import."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return Finding(part, name, "fails", f"it does not import ({type(error).__name__}: {reason})", remedy)


def lines(findings: Sequence[Finding]) -> list[str]:
    """The findings as text for people, under their headings."""
    width = max((len(f.name) for f in findings), default=0)
    text: list[str] = []
    part = ""
    for f in findings:
        if f.part != part:
            part = f.part
            text += ["", part]
        text.append(f"  {f.state:<5}  {f.name:<{width}}  {f.text}".rstrip())
        if f.remedy:
            text.append(f"  {'':<5}  {'':<{width}}  -> {f.remedy}")
    return text[1:]
