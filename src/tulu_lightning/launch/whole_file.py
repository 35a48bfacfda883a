"""A long file written piece by piece that is there whole or not at all."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write beside the file and rename at the end; what was written until an error or Ctrl-C is removed.

    A name that ends with .gz or .zst makes a packed file.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _opened(beside, path.suffix) as file:
            yield file
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _opened(path: Path, suffix: str) -> TextIO:
    if suffix == ".gz":
        return cast(TextIO, gzip.open(path, "wt", encoding="utf-8"))
    if suffix == ".zst":
        import zstandard

        return cast(TextIO, zstandard.open(path, "wt", encoding="utf-8"))
    return path.open("w", encoding="utf-8")
