"""JSON read by Python: exact, and able to name the row that is wrong.

`data/files.py` reads JSON through `datasets` where that gives the same rows, and comes here where it does not.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tulu_lightning.errors import InputError

__all__ = ["count_lines", "digest_of", "read_lines", "read_list", "starts_a_list", "stream_lines"]

CHUNK = 1 << 20


def digest_of(paths: list[Path]) -> str:
    """SHA-256 over the bytes of some files, one after the other, wherever they lie. Hexadecimal.

    Raises:
        InputError: one is missing or cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        with _reading(path), path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def count_lines(path: Path) -> int:
    """Lines of a file (unpacked), without the empty ones at its end.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    lines, ends, begun = 0, 0, False  # `ends`: line ends since the last thing that is not white space
    for chunk in _chunks(path):
        written = chunk.rstrip()
        if written:
            lines += ends + written.count(b"\n")
            ends, begun = 0, True
        ends += chunk.count(b"\n", len(written))
    return lines + begun


def starts_a_list(path: Path) -> bool:
    """Whether the first character of a JSON file opens a list.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    for chunk in _chunks(path):
        if text := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
            return text.startswith(b"[")
    return False


def read_lines(path: Path, row_name: Callable[[int], str]) -> Iterator[Any]:
    """What each line of a JSON-lines file holds.

    Args:
        path: plain, or packed as .gz or .zst.
        row_name: how an error names a row, from 1.

    Raises:
        InputError: it cannot be read, or a line is empty or not JSON.
    """
    # Only \n ends a JSON line; str.splitlines would also cut at U+2028, which JSON strings may hold.
    lines = _text(path).rstrip().split("\n")
    if lines == [""]:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            found = f"the line is not JSON ({error.msg} at column {error.colno})"
            found = found if line.strip() else "the line is empty"
            raise InputError(row_name(number), found, "Write one JSON object a line.") from None


def stream_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file (unpacked), one at a time, without those that are empty.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    rest = b""
    for chunk in _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


def read_list(path: Path) -> list[Any]:
    """The list that a JSON file holds.

    Raises:
        InputError: it cannot be read, is not JSON, or holds something else.
    """
    text = _text(path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"the file is not JSON ({error.msg} in line {error.lineno}, column {error.colno})"
        raise InputError(str(path), what, "Give one list of objects, or a .jsonl file with an object a line.") from None
    if not isinstance(found, list):
        what = f"the file holds a {type(found).__name__}, not a list"
        raise InputError(str(path), what, "Give one list of objects, or a .jsonl file with an object a line.")
    return found


def _text(path: Path) -> str:
    with _reading(path):
        return b"".join(_chunks(path)).decode("utf-8-sig")


def _chunks(path: Path) -> Iterator[bytes]:
    with _reading(path):
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                yield from iter(lambda: file.read(CHUNK), b"")
        else:
            with path.open("rb") as file:
                yield from _unpack_zst(file) if path.suffix == ".zst" else iter(lambda: file.read(CHUNK), b"")


def _unpack_zst(file: BinaryIO) -> Iterator[bytes]:
    from zstandard import ZstdDecompressor

    frame, inside = ZstdDecompressor().decompressobj(), False
    for chunk in iter(lambda: file.read(CHUNK), b""):
        while chunk:
            yield frame.decompress(chunk)
            chunk, inside = (frame.unused_data, False) if frame.eof else (b"", True)
            if frame.eof:
                frame = ZstdDecompressor().decompressobj()
    if inside:  # the library's own reader takes a file cut short for a whole one
        raise EOFError("the compressed file ends before its end")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file", "Correct the source's path.") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(str(path), f"the file cannot be read ({error})", _remedy(path)) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # named, so that zstandard is imported for .zst files only
            raise
        raise InputError(str(path), f"the file cannot be read ({error})", _remedy(path)) from error


def _remedy(path: Path) -> str:
    return f"Give a whole {path.suffix} file." if path.suffix in (".gz", ".zst") else "Give a readable UTF-8 file."
