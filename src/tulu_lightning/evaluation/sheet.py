"""The file in which a task keeps what it has got so far, so that a run that was stopped goes on.

One JSON object a line. The first says what the others belong to. Then answers as they come, and items: examples whose answers
are judged. Of an item the answers' own line is not needed any more, and goes when the file is next opened.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from tulu_lightning.evaluation.result import Item
from tulu_lightning.evaluation.task import Example

__all__ = ["Said", "Sheet", "Text", "is_answered"]


class Text(TypedDict):
    """One answer, as the verifier will read it."""

    text: str
    tokens: int
    finish: str


class Said(TypedDict):
    """All answers to an example, not judged yet."""

    key: str
    asked: str
    """The example's digest."""
    said: list[Text]


class Sheet:
    """What is there of a task. A line that a kill left half written is dropped.

    Args:
        path: of the file; None keeps nothing.
        head: what the lines belong to; a sheet with another head is begun anew.
        others: sheets of the same task whose lines are taken in.
    """

    def __init__(self, path: Path | None, head: dict[str, Any], others: Iterable[Path] = ()) -> None:
        self._path = path
        self.items: dict[str, Item] = {}
        """Judged, by key."""
        self.said: dict[str, Said] = {}
        """Answers that are not, by key."""
        for each in [] if path is None else [path, *others]:
            self._fill(_lines(each, head))
        if path is not None:  # rewritten, so that half a line at its end does not spoil the next one
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.tmp")
            kept = [head, *self.items.values(), *self.said.values()]
            beside.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
            beside.replace(path)

    def _fill(self, lines: Sequence[Any]) -> None:
        """Take what is not there yet. Of several lines of a key in one file the last counts."""
        items = {line["key"]: line for line in lines if "said" not in line}
        said = {line["key"]: line for line in lines if "said" in line}
        self.items, said = {**self.items, **items, **self.items}, {**self.said, **said, **self.said}
        judged = {key: item.get("asked") for key, item in self.items.items()}
        self.said = {key: each for key, each in said.items() if key not in judged or each["asked"] != judged[key]}

    def add(self, items: Sequence[Item]) -> None:
        """Keep judged items."""
        self.items.update({item["key"]: item for item in items})
        for item in items:
            self.said.pop(item["key"], None)
        self._write(items)

    def hold(self, example: Example, texts: list[Text]) -> None:
        """Keep the answers to an example until they are judged."""
        said = Said(key=example.key, asked=example.digest(), said=texts)
        self.said[example.key] = said
        self._write([said])

    def texts(self, example: Example) -> list[Text] | None:
        """The answers to an example that wait to be judged; None where there are none to the same question."""
        said = self.said.get(example.key)
        return said["said"] if said is not None and said["asked"] == example.digest() else None

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def is_answered(example: Example, items: Mapping[str, Item]) -> bool:
    """Whether an item of its key is there, and of the same question."""
    item = items.get(example.key)
    return item is not None and item.get("asked") == example.digest()


def _lines(path: Path, head: dict[str, Any]) -> list[Any]:
    """The lines of a sheet behind its head; none where it is not there, or belongs to something else."""
    lines: list[Any] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines: a text may hold other line ends
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines[1:] if lines and lines[0] == head else []
