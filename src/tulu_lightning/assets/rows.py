"""Real chat rows and preference pairs out of a registry package: what tests and demos have that is not made by us."""

import hashlib
import json
import tarfile
from typing import Any

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.errors import InputError

__all__ = ["alpaca_rows", "preference_rows"]

ARCHIVE = "llamafactory-0.9.5.tar.gz"
SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"
PAIRS = "llamafactory-0.9.5/data/dpo_en_demo.json"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


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
    for row in json.loads(_read_member(MEMBER)):
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        if len(question) + len(row["output"]) <= max_chars:
            short.append((question, row["output"]))
    if not 1 <= limit <= len(short):
        found = f"limit is {limit}, and {len(short)} rows have at most {max_chars} characters"
        raise InputError("alpaca_rows", found, f"Use a limit from 1 to {len(short)}, or raise max_chars.")
    short.sort(key=lambda pair: _place(seed, pair[0]))
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "source": "alpaca",
        }
        for question, answer in short[:limit]
    ]


def preference_rows(limit: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """Real preference pairs (`dpo_en_demo`, 300 rows); 186 have a system message or several turns.

    They are read out of the package and never copied into this project. No pair has two equal answers.

    Args:
        limit: number of rows.
        seed: decides which rows, and their order.

    Returns:
        Rows with `prompt` (messages), `chosen` and `rejected` (each a list of one assistant message).

    Raises:
        InputError: the package is not in the cache or is not the known one, or has too few rows.
    """
    rows = json.loads(_read_member(PAIRS))
    if not 1 <= limit <= len(rows):
        raise InputError(
            "preference_rows", f"limit is {limit}, and there are {len(rows)} rows", f"Use 1 to {len(rows)}."
        )
    rows.sort(key=lambda row: _place(seed, json.dumps(row)))
    return [
        {
            "prompt": [_message(turn) for turn in row["conversations"]],
            "chosen": [_message(row["chosen"])],
            "rejected": [_message(row["rejected"])],
        }
        for row in rows[:limit]
    ]


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def _place(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _read_member(name: str) -> bytes:
    archive = cache_dir() / "packages" / ARCHIVE
    if not archive.is_file():
        raise InputError(str(archive), "the package with the chat rows is not there", "Run `make setup`.")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        remedy = "Delete it and run `make setup`."
        raise InputError(str(archive), "the file is damaged or another version (its SHA-256 is wrong)", remedy)
    with tarfile.open(archive) as tar:
        member = tar.extractfile(name)
        assert member is not None  # the hash above says that it is there
        return member.read()
