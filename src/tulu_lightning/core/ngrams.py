"""Overlap of a test item with a training row by shared n-grams (Tülu 3, section 3.2), to the letter and one pair at a time.

`data.overlap` computes the same for millions of rows; here is what it has to equal, and what marks the shared spans.
"""

from collections.abc import Sequence

__all__ = [
    "SEPARATORS",
    "Grams",
    "field_share",
    "grams",
    "item_share",
    "matched",
    "token_spans",
    "tokens",
    "whole_share",
]

Grams = set[tuple[str, ...]]

SEPARATORS = ' ,.?!:;()"-\n\\'
"""Between tokens, as in the release's analyser. Signs of arithmetic are none, so they stay in their tokens or are ones."""
_SPLIT = str.maketrans(dict.fromkeys(SEPARATORS, "\n"))


def tokens(text: str) -> list[str]:
    """The tokens of a text, in lower case: "2+2 = What?" -> ["2+2", "=", "what"]."""
    return [token for token in text.lower().translate(_SPLIT).split("\n") if token]


def token_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each token in the text as it is written; as many as `tokens` has."""
    spans, start = [], None
    for place, character in enumerate(text):
        if character in SEPARATORS:
            if start is not None:
                spans.append((start, place))
            start = None
        elif start is None:
            start = place
    return spans if start is None else [*spans, (start, len(text))]


def grams(turns: Sequence[Sequence[str]], n: int = 8) -> Grams:
    """The n-grams of a training row; each lies within one turn."""
    return {tuple(turn[at : at + n]) for turn in turns for at in range(len(turn) - n + 1)}


def matched(test: Sequence[str], seen: Grams, n: int = 8) -> list[bool]:
    """Which tokens of a test text lie within an n-gram that a training row has too.

    Args:
        test: tokens of one field of a test item.
        seen: of the row.
        n: tokens of an n-gram. A text with fewer has none, and no token of it matches.
    """
    found = [False] * len(test)
    for at in range(len(test) - n + 1):
        if tuple(test[at : at + n]) in seen:
            found[at : at + n] = [True] * n
    return found


def field_share(test: Sequence[str], seen: Grams, n: int = 8, turns: Sequence[Sequence[str]] = ()) -> float:
    """Share of a field's tokens that match a row, 0 to 1; 0 of a field without tokens.

    Args:
        test: the field's tokens.
        seen: n-grams of the row.
        n: tokens of an n-gram.
        turns: tokens of the row's turns, of which a field with fewer than n tokens may be one as a whole. Without them
            it matches nothing, as in the release.
    """
    if len(test) < n:
        return float(bool(test) and _is_turn(test, turns))
    return sum(matched(test, seen, n)) / len(test)


def item_share(fields: Sequence[Sequence[str]], seen: Grams, n: int = 8, turns: Sequence[Sequence[str]] = ()) -> float:
    """Overlap of a test item with a row: the mean over the item's fields, as the release takes it."""
    return sum(field_share(field, seen, n, turns) for field in fields) / len(fields)


def whole_share(fields: Sequence[Sequence[str]], turns: Sequence[Sequence[str]]) -> float:
    """The same by whole texts: a field counts if some turn consists of just its tokens. Empty ones count nowhere."""
    return sum(bool(field) and _is_turn(field, turns) for field in fields) / len(fields)


def _is_turn(test: Sequence[str], turns: Sequence[Sequence[str]]) -> bool:
    return any(list(turn) == list(test) for turn in turns)
