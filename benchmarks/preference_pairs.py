"""Real preference pairs as token ids, the same for both sides: whole conversations, and short ones cut from them."""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.assets.rows import ARCHIVE
from tulu_lightning.data.chat import ChatTemplate, chat_template, encode, encode_answer
from tulu_lightning.errors import InputError

MEMBER = "llamafactory-0.9.5/data/dpo_en_demo.json"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
WORDS, ANSWER = 8, 100
"""Of a short pair: words of the prompt, and most tokens of an answer, its end token not counted."""


class IdPair(NamedTuple):
    """Token ids of a pair, template included."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer conversation."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def tokens(self) -> int:
        """Tokens of both conversations, the prompt counted twice."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def read_pairs(kind: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[IdPair]:
    """The 300 pairs of `dpo_en_demo`, in an order that depends on nothing but their words.

    Args:
        kind: `real`: whole conversations under SmolLM2's template; `short`: the first words of the last question under
            a template without a system message, and the start of both answers, where these are long enough.
        tokenizer: SmolLM2's.
        max_tokens: a longer conversation is left out.

    Raises:
        InputError: the package with the rows is not in the cache.
    """
    short = kind == "short"
    template = chat_template("chatml" if short else "smollm2", tokenizer)
    rows = sorted(_rows(), key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())
    pairs = [_pair(tokenizer, template, row, short) for row in rows]
    return [pair for pair in pairs if pair is not None and pair.longest <= max_tokens]


def _rows() -> list[dict[str, Any]]:
    archive = cache_dir() / "packages" / ARCHIVE
    if not archive.is_file():
        raise InputError(str(archive), "the package with the pairs is not there", "Run `make setup`.")
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        return json.load(member)


def _pair(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, row: dict[str, Any], short: bool
) -> IdPair | None:
    turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    if short:
        turns = [{"role": "user", "content": " ".join(turns[-1]["content"].split()[:WORDS])}]
    prompt, _ = encode(tokenizer, template, turns, generation_prompt=True)
    sides = [encode_answer(tokenizer, template, row[side]["value"]) for side in ("chosen", "rejected")]
    if short:
        if min(map(len, sides)) <= ANSWER:
            return None
        sides = [[*ids[:ANSWER], ids[-1]] for ids in sides]
    return None if sides[0] == sides[1] else IdPair(prompt, *sides)


def about(pairs: Sequence[IdPair]) -> dict[str, float]:
    """Tokens a pair, and which shares of them are left when prompts are computed once, and are scored."""
    tokens = sum(pair.tokens for pair in pairs)
    prompts = sum(len(pair.prompt_ids) for pair in pairs)
    return {
        "pairs": len(pairs),
        "tokens_per_pair": round(tokens / len(pairs)),
        "computed_share": round(1 - prompts / tokens, 3),
        "scored_share": round(1 - 2 * prompts / tokens, 3),
    }


def write_rows(path: Any, pairs: Sequence[IdPair]) -> None:
    """Write pairs as the rows that both sides read."""
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs))
