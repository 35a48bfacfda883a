"""All n-grams of some evaluation sets, in files that are mapped: processes of one machine share one copy.

| file | holds |
|---|---|
| `hashes` | the different n-grams' hashes, ascending |
| `begins` | for each, where its places begin in `places` |
| `places` | tokens, numbered over all fields, at which an n-gram begins |
| `maybe` | for the first bits of a hash, whether any n-gram has them: most of what is asked for ends here |
| `fields` | first token of each field, and the end |
| `items` | first field of each item, and the end |
| `wholes`, `whole_fields` | of each field as a whole: hashes, ascending, and whose they are |
| `texts`, `text_ends` | the fields' texts, as UTF-8, and where each ends |
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tulu_lightning.core.ngrams import tokens
from tulu_lightning.data.ngram_hash import Array, hashed, ngram_hashes, whole_hashes

__all__ = ["Index", "Set", "write_index"]

BATCH = 4 << 20
"""Characters that are hashed at once."""
META = "index.json"


class Set(NamedTuple):
    """One evaluation set."""

    name: str
    items: Sequence[Sequence[str]]
    """The fields of each item."""


class Index:
    """A folder that `write_index` wrote, mapped."""

    def __init__(self, folder: Path) -> None:
        known = json.loads((folder / META).read_text(encoding="utf-8"))
        self.folder, self.n = folder, int(known["n"])
        self.names: list[str] = known["names"]
        self.first_items = np.array([0, *np.cumsum(known["counts"])], np.int64)
        """First item of each set, and the end."""
        names = (
            "hashes",
            "begins",
            "places",
            "maybe",
            "fields",
            "items",
            "wholes",
            "whole_fields",
            "texts",
            "text_ends",
        )
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        self.hashes, self.begins, self.places, self.maybe = (arrays[name] for name in names[:4])
        self.fields, self.items, self.wholes, self.whole_fields = (arrays[name] for name in names[4:8])
        self.texts, self.text_ends = arrays["texts"], arrays["text_ends"]
        self.field_items = np.repeat(np.arange(len(self.items) - 1), np.diff(self.items))
        self._shift = np.uint64(64 - len(self.maybe).bit_length() + 1)

    def find(self, hashes: Array) -> tuple[Array, Array]:
        """Which of these hashes are here: their numbers among those asked for, and their places among `hashes`."""
        some = np.flatnonzero(self.maybe[hashes >> self._shift])
        some = some[np.argsort(hashes[some])]  # neighbours are looked for where the last one was found
        asked = hashes[some]
        at = np.searchsorted(self.hashes, asked)
        at[at == len(self.hashes)] = 0
        same = self.hashes[at] == asked if len(self.hashes) else np.zeros(0, bool)
        return some[same], at[same]

    def text(self, field: int) -> str:
        """What a field says."""
        begin = int(self.text_ends[field - 1]) if field else 0
        return self.texts[begin : int(self.text_ends[field])].tobytes().decode("utf-8", "surrogatepass")

    def item(self, item: int) -> list[str]:
        """The fields of an item, numbered over all sets."""
        return [self.text(field) for field in range(int(self.items[item]), int(self.items[item + 1]))]

    def item_tokens(self, item: int) -> list[list[str]]:
        """Their tokens."""
        return [tokens(text) for text in self.item(item)]

    def set_of(self, item: int) -> tuple[int, int]:
        """The set that an item is in, and its number there."""
        place = int(np.searchsorted(self.first_items, item, side="right")) - 1
        return place, item - int(self.first_items[place])


def write_index(folder: Path, sets: Sequence[Set], n: int) -> None:
    """Index evaluation sets.

    Args:
        folder: exists and is empty.
        sets: each with at least one item, each item with at least one field.
        n: tokens of an n-gram.
    """
    texts = [text for each in sets for item in each.items for text in item]
    counts = np.array([len(item) for each in sets for item in each.items], np.int64)
    lengths: list[Array] = []
    grams: list[Array] = []
    places: list[Array] = []
    wholes: list[Array] = []
    owners: list[Array] = []
    before = 0
    for start, batch in _batches(texts):
        found = hashed(batch)
        lengths.append(np.bincount(found.texts_T, minlength=len(batch)))
        values, at = ngram_hashes(found, n)
        grams.append(values)
        places.append(at + before)
        values, of = whole_hashes(found)
        wholes.append(values)
        owners.append(of + start)
        before += len(found.tokens_T)
    _save(folder, "fields", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))
    _save(folder, "items", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    _save_grams(folder, np.concatenate(grams), np.concatenate(places))
    values = np.concatenate(wholes)
    order = np.argsort(values, kind="stable")
    _save(folder, "wholes", values[order])
    _save(folder, "whole_fields", np.concatenate(owners)[order])
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    _save(folder, "texts", np.frombuffer(b"".join(encoded), np.uint8))
    _save(folder, "text_ends", np.cumsum([len(text) for text in encoded]).astype(np.int64))
    known = {"n": n, "names": [each.name for each in sets], "counts": [len(each.items) for each in sets]}
    (folder / META).write_text(json.dumps(known), encoding="utf-8")


def _save_grams(folder: Path, grams: Array, places: Array) -> None:
    order = np.argsort(grams, kind="stable")
    grams = grams[order]
    different = (
        np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]])) if len(grams) else np.zeros(0, np.int64)
    )
    hashes = grams[different]
    _save(folder, "hashes", hashes)
    _save(folder, "begins", np.append(different, len(grams)).astype(np.int64))
    _save(folder, "places", places[order].astype(np.int64))
    bits = max(12, int(16 * len(hashes)).bit_length())  # one asked for in sixteen or more passes by chance
    maybe = np.zeros(1 << bits, bool)
    maybe[hashes >> np.uint64(64 - bits)] = True
    _save(folder, "maybe", maybe)


def _save(folder: Path, name: str, values: Any) -> None:
    np.save(folder / f"{name}.npy", values, allow_pickle=False)


def _batches(texts: Sequence[str]) -> Any:
    start = size = 0
    for place, text in enumerate(texts):
        size += len(text)
        if size > BATCH:
            yield start, texts[start : place + 1]
            start, size = place + 1, 0
    if start < len(texts):
        yield start, texts[start:]
