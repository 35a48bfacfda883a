"""Real chat rows out of a registry package: the small part of an SFT mixture that is not made by us."""

import hashlib
import json
import tarfile
from typing import Any

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.errors import InputError

__all__ = ["alpaca_rows"]

ARCHIVE = "llamafactory-0.9.5.tar.gz"
SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"


def alpaca_rows(limit: int, seed: int = 0, max_chars: int = 400) -> list[dict[str, Any]]:
    """Short instruction-following rows (`alpaca_en_demo`, 999 rows, of which 410 are within 400 characters).

    The text behind it is for non-commercial use; it is read out of the package and never copied into this project.

    Args:
        limit: number of rows.
        seed: decides which of the short rows, and their order.
        max_chars: longest row, question and answer together, in characters.

    Returns:
        Rows with `messages` (user, assistant) and `source`.

    Raises:
        InputError: the package is not in the cache or is not the known one, or has too few short rows.
    """
    short = []
    for row in json.loads(_read_member()):
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        if len(question) + len(row["output"]) <= max_chars:
            short.append((question, row["output"]))
    if not 1 <= limit <= len(short):
        found = f"limit is {limit}, and {len(short)} rows have at most {max_chars} characters"
        raise InputError("alpaca_rows", found, f"Use a limit from 1 to {len(short)}, or raise max_chars.")
    short.sort(key=lambda pair: hashlib.sha256(f"{seed}:{pair[0]}".encode()).digest())
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "source": "alpaca",
        }
        for question, answer in short[:limit]
    ]


def _read_member() -> bytes:
    archive = cache_dir() / "packages" / ARCHIVE
    if not archive.is_file():
        raise InputError(str(archive), "the package with the chat rows is not there", "Run `make setup`.")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        remedy = "Delete it and run `make setup`."
        raise InputError(str(archive), "the file is damaged or another version (its SHA-256 is wrong)", remedy)
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None  # the hash above says that it is there
        return member.read()
