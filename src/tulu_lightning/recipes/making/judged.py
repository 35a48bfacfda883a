"""What the ratings of `tulu judge` come to: means, what could not be read, and how far raters agree."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tulu_lightning.core.agreement import agreement
from tulu_lightning.core.binarise import NOT_APPLICABLE, Rating, mean_rating
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.store import read_rows, text_digest

__all__ = ["UNRATED", "VERIFIER", "Rated", "agreements", "check_texts", "means_of", "ratings_told", "tell"]

VERIFIER = "verifier"
"""What rating rows call the verifiers, as judge and as aspect."""


class Rated(NamedTuple):
    """What ratings of a response come to."""

    mean: float | None
    """None where one of them could not be read or is missing: over other aspects than its rivals' it would not compare."""
    verified: float | None
    """The verifiers' score; None where they did not rate."""
    whole: bool
    """Whether no rating is missing that other responses have."""


UNRATED = Rated(None, None, False)


def check_texts(
    rows: Iterable[Mapping[str, Any]], groups: Iterable[Iterable[Mapping[str, Any]]], ratings: str, responses: str
) -> Iterator[Mapping[str, Any]]:
    """The same ratings, each once it is seen to be of the texts that the responses have now under its names.

    Args:
        rows: of ratings; those of older versions do not say what they are about.
        groups: the responses.
        ratings: their folder, for the message.
        responses: likewise.

    Raises:
        InputError: a rating is of another text.
    """
    now = {row["key"]: text_digest(row["response"]) for group in groups for row in group}
    for row in rows:
        for key, digest in zip(row.get("responses", ()), row.get("texts", ()), strict=False):
            if now.get(key, digest) != digest:
                what = f"its ratings are of other texts than {responses} holds now (response {key})"
                raise InputError(ratings, what, "Remove it, or give another output: responses were made anew.")
        yield row


def means_of(folder: str, groups: Sequence[Sequence[Mapping[str, Any]]], responses: str) -> dict[str, Rated]:
    """What each response is worth, over judges, aspects and rounds. Where only verifiers rated, theirs is the mean.

    Args:
        folder: of ratings.
        groups: the responses.
        responses: their folder, for messages.

    Raises:
        InputError: a row is none of ratings, or is of another text.
    """
    by: dict[str, dict[bool, list[Rating]]] = defaultdict(lambda: {True: [], False: []})
    calls: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
    for row in check_texts(_ratings(folder), groups, folder, responses):
        verifier = row["judge"] == VERIFIER
        calls[verifier].add((row["judge"], row.get("aspect"), row.get("round")))
        for response, rating in zip(row["responses"], row["ratings"], strict=True):
            by[response][verifier].append(rating)
    found = {}
    for response, ratings in by.items():
        whole = {kind: len(ratings[kind]) >= len(calls[kind]) for kind in calls}
        mean, verified = (mean_rating(ratings[kind]) if whole[kind] else None for kind in (False, True))
        found[response] = Rated(mean if calls[False] else verified, verified, all(whole.values()))
    return found


def _ratings(folder: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_rows(folder), start=1):
        if "judge" not in row or len(row.get("responses", ())) != len(row.get("ratings", (None,))):
            remedy = "Give the folder that tulu judge wrote."
            raise InputError(f"{folder}, row {number}", "is no row of ratings", remedy)
        yield row


def ratings_told(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By judge and aspect: mean, how many could not be read, how many do not apply."""
    by: dict[tuple[str, str], list[Rating]] = defaultdict(list)
    for row in rows:
        by[row["judge"], row["aspect"]].extend(row["ratings"])
    told = []
    for (judge, aspect), ratings in by.items():
        numbers = [rating for rating in ratings if isinstance(rating, int | float)]
        told.append(
            {
                "judge": judge,
                "aspect": aspect,
                "n": len(ratings),
                "mean": sum(numbers) / len(numbers) if numbers else None,
                "unreadable": sum(rating is None for rating in ratings),
                "not_applicable": sum(rating == NOT_APPLICABLE for rating in ratings),
                "counts": {f"{value:g}": count for value, count in sorted(Counter(numbers).items())},
            }
        )
    return told


def agreements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of any two judges (round 0), and of each judge with itself (round 0 with each later one), over all aspects."""
    raters: dict[tuple[str, int], dict[Any, float]] = defaultdict(dict)
    for row in rows:
        if row["judge"] == VERIFIER:
            continue
        for response, rating in zip(row["responses"], row["ratings"], strict=True):
            if isinstance(rating, int | float):
                raters[row["judge"], row["round"]][(row["prompt_key"], row["aspect"]), response] = float(rating)
    told = []
    names = sorted(raters)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            itself = one[0] == other[0] and one[1] == 0
            if (itself or (one[1] == other[1] == 0)) and (found := agreement(raters[one], raters[other])):
                names_of = {"first": f"{one[0]}, round {one[1]}", "second": f"{other[0]}, round {other[1]}"}
                told.append(names_of | found._asdict())
    return told


def tell(summary: Mapping[str, Any], output: str) -> None:
    """Print what a summary of ratings says."""
    for each in summary["ratings"]:
        mean = "no rating" if each["mean"] is None else f"mean {each['mean']:.2f}"
        print(f"{each['judge']}, {each['aspect']}: {mean} of {each['n']:,}, {each['unreadable']} unreadable")
    for each in summary["agreement"]:
        order = "" if each["same_order"] is None else f", same order of two responses {each['same_order']:.0%}"
        kappa = "" if each["kappa"] is None else f", kappa {each['kappa']:.2f}"
        print(f"{each['first']} and {each['second']}: same rating {each['same']:.0%}{kappa}{order} (n = {each['n']:,})")
    if summary["failed"]:
        print(f"{summary['failed']:,} questions got no answer; the same command asks them again")
    print(f"ratings of {summary['prompts']:,} prompts: {output}", flush=True)
