"""Decontamination by embeddings: a row overlaps with a test item if one of its turns has nearly the same direction.

Every text is one vector, from a model that the settings name. Cosines of turns and items are matrix products, a block of
items at a time; of each only what is above the threshold is kept.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tulu_lightning.assets.cache import build_once
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.data.decontaminate_settings import EMBEDDER, Decontaminate
from tulu_lightning.data.importing import find_function
from tulu_lightning.data.keys import key
from tulu_lightning.data.ngram_hash import Array
from tulu_lightning.data.ngram_index import Index
from tulu_lightning.data.overlap import Overlaps
from tulu_lightning.errors import InputError
from tulu_lightning.files import content_digest
from tulu_lightning.progress import Progress

__all__ = ["identity", "similar"]

ITEMS = 4096
"""Test items of one matrix product."""
TEXTS = 1024
"""Texts that the embedder is given at once."""
MOST = 2_000_000
"""Pairs of a few thousand rows that are kept; more say that the threshold tells nothing apart."""


def similar(index: Index, rows: Sequence[Sequence[str]], settings: Decontaminate) -> Overlaps:
    """The pairs whose cosine is above `settings.similarity`; of a row with several turns the largest counts.

    Args:
        index: of the evaluation sets; an item's fields are one text, with a new line between them.
        rows: the turns of each row.
        settings: of mode `embedding`.

    Raises:
        InputError: the embedder cannot be had, gives something else than vectors, or nearly all pairs are that similar.
    """
    assert settings.similarity is not None
    items_ID = _items(index, settings)
    turns_TD = _directions([turn for row in rows for turn in row], settings)
    turn_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    parts: list[tuple[Array, Array, Array]] = []
    many = 0
    for start in range(0, len(items_ID), ITEMS):
        cosines_TI = turns_TD @ np.asarray(items_ID[start : start + ITEMS]).T
        turns, items = np.nonzero(cosines_TI > settings.similarity)
        parts.append((turn_rows[turns], items + start, cosines_TI[turns, items].astype(np.float64)))
        if (many := many + len(turns)) > MOST:
            what = (
                f"is {settings.similarity:g}, and {many:,} pairs of {len(rows):,} rows and the test items are above it"
            )
            raise InputError("decontaminate.similarity", what, "Raise it; what tells texts apart depends on the model.")
    rows_P, items_P, cosines_P = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((-cosines_P, items_P, rows_P))
    rows_P, items_P, cosines_P = rows_P[order], items_P[order], cosines_P[order]
    first = np.ones(len(rows_P), bool)
    first[1:] = (rows_P[1:] != rows_P[:-1]) | (items_P[1:] != items_P[:-1])
    return Overlaps(rows_P[first].astype(np.int64), items_P[first].astype(np.int64), cosines_P[first])


def identity(settings: Decontaminate) -> str:
    """What decides the vectors: the embedder, the files of the model, and where texts are cut.

    Raises:
        InputError: there is no such model.
    """
    model = str(settings.model)
    if settings.embedder == EMBEDDER:
        model = _digest(str(resolve_model(model)))
    elif Path(model).expanduser().is_dir():
        model = _digest(str(Path(model).expanduser()))
    return key({"embedder": settings.embedder, "model": model, "max_tokens": settings.max_tokens, "version": 1})


@lru_cache
def _digest(folder: str) -> str:
    return content_digest(sorted(path for path in Path(folder).iterdir() if path.is_file() and path.name[0] != "."))


def _items(index: Index, settings: Decontaminate) -> Array:
    def build(folder: Path) -> None:
        texts = ["\n".join(index.item(item)) for item in range(len(index.items) - 1)]
        np.save(folder / "items.npy", _directions(texts, settings, "embedding test items"), allow_pickle=False)

    name = key({"index": index.folder.name, "embedding": identity(settings)})
    return _mapped(build_once(f"embeddings-{name}", build) / "items.npy")


@lru_cache
def _mapped(path: Path) -> Array:
    return np.load(path, mmap_mode="r")


def _directions(texts: Sequence[str], settings: Decontaminate, label: str = "") -> Array:
    """[texts, D], float32: vectors of length 1, or 0 where the text has none."""
    embed = find_function("decontaminate.embedder", settings.embedder, EMBEDDER)
    parts: list[Any] = []
    with Progress(label or "embedding", len(texts), unit="texts") as progress:
        for start in range(0, len(texts), TEXTS):
            some = list(texts[start : start + TEXTS])
            made = np.asarray(embed(some, settings.model, settings.max_tokens), dtype=np.float32)
            if made.ndim != 2 or len(made) != len(some) or not np.isfinite(made).all():
                what = f"{settings.embedder} gives {made.shape} for {len(some)} texts, or numbers that are none"
                raise InputError("decontaminate.embedder", what, "It must return an array [texts, width].")
            parts.append(made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12))
            if label:
                progress.update(start + len(some))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
