"""`tulu pairs`: preference pairs out of rated responses; with `generate` and `judge` in its config it makes these first.

Tülu 3, section 5.2.1. Where an engine of ours sampled both sides, token ids are written beside the text and are what
DPO trains on.
"""

import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tulu_lightning.callbacks.promote import peak_memory_bytes
from tulu_lightning.core.binarise import NoPair, pick
from tulu_lightning.core.settings import require
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.making.generate import POLICY, GenerateConfig, generate
from tulu_lightning.recipes.making.judge import JudgeConfig, judge
from tulu_lightning.recipes.making.judged import UNRATED, Rated, means_of
from tulu_lightning.recipes.making.responses import groups_of
from tulu_lightning.recipes.pair_files import RULE, check_output, write_pairs
from tulu_lightning.recipes.pair_lengths import PairLengths, pair_lengths

__all__ = ["PairsConfig", "main", "make_pairs"]


@dataclass(frozen=True)
class PairsConfig:
    """Make preference pairs of rated responses."""

    output: str
    """Folder for pairs.jsonl, held_out.jsonl (or .parquet) and summary.json."""
    input: str | None = None
    """Folder that `tulu generate` wrote; OUTPUT/generate where `generate` is given."""
    ratings: str | None = None
    """Folder that `tulu judge` wrote; OUTPUT/judge where `judge` is given."""
    generate: GenerateConfig | None = None
    """Make the responses first, in OUTPUT/generate."""
    judge: JudgeConfig | None = None
    """Rate them first, in OUTPUT/judge."""
    literal: bool = False
    """As the paper's release does it: rejected is any other response, one that is as good or has no rating included."""
    min_chosen: float | None = None
    """A prompt whose best response has a lower mean rating makes no pair."""
    sides: Literal["any", "one_on_policy"] = "any"
    """`one_on_policy`: only pairs with the current checkpoint on one side."""
    verified: bool = False
    """Only pairs whose chosen response the rows' verifiers find right (ratings must hold theirs too)."""
    on_policy_share: float | None = None
    """Leave out pairs, drawn by the seed, until this share of them has the current checkpoint on a side."""
    held_out_share: float = 0.0
    """Share of the prompts whose pairs go to held_out.jsonl, decided by the prompt alone."""
    seed: int = 0
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the pairs' files; `generate` and `judge` have their own."""
    limit: int | None = None
    """Only the first so many prompts."""
    dry_run: bool = False
    """Show the first request, or where nothing is asked the first pair, and make nothing."""

    def check(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            InputError: names the key and what would do.
        """
        for name in ("input", "ratings"):
            made = "generate" if name == "input" else "judge"
            if (getattr(self, name) is None) == (getattr(self, made) is None):
                raise InputError("pairs", f"has neither or both of {name} and {made}", "Give exactly one.")
        own = (
            ("generate.output", self.generate and self.generate.output),
            ("judge.output", self.judge and self.judge.output),
        )
        for name, value in (*own, ("judge.input", self.judge and self.judge.input)):
            require(not value, name, repr(value), "Leave it out: here it is a folder of output, or input of the pairs.")
        share = self.on_policy_share
        require(share is None or 0 <= share <= 1, "on_policy_share", share, "It is a share of the pairs: 0 to 1.")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "Use at least 1, or leave it out.")
        require(0 <= self.held_out_share < 1, "held_out_share", self.held_out_share, "Use 0 to below 1.")


def main(argv: Sequence[str]) -> int:
    """`tulu pairs --config FILE`."""
    config, _ = read_config(PairsConfig, "tulu pairs", argv)
    make_pairs(config)
    return 0


def make_pairs(config: PairsConfig) -> dict[str, Any]:
    """Generate and judge if the config says so, then pair; a killed run goes on where it stopped.

    Returns:
        The summary that is also written to `summary.json`; empty after a dry run.

    Raises:
        InputError: see `generate` and `judge`; no prompt makes a pair.
    """
    config.check()
    started = time.perf_counter()
    output = Path(config.output)
    made: dict[str, Any] = {}
    responses, ratings = config.input or str(output / "generate"), config.ratings or str(output / "judge")
    check_output(output, {name: getattr(config, name) for name in RULE})
    if config.generate is not None:
        dry = config.dry_run or config.generate.dry_run
        limit = config.generate.limit if config.limit is None else config.limit
        made = generate(dataclasses.replace(config.generate, output=responses, dry_run=dry, limit=limit))
        if dry:
            return {}
    if config.judge is not None:
        dry = config.dry_run or config.judge.dry_run
        limit = config.judge.limit if config.limit is None else config.limit
        judge(dataclasses.replace(config.judge, input=responses, output=ratings, dry_run=dry, limit=limit))
        if dry:
            return {}
    groups, incomplete = groups_of(responses, config.limit, ids=True)
    means = means_of(ratings, groups, responses)
    without: Counter[str] = Counter({"responses are missing": incomplete} if incomplete else {})
    rows = _mixed(list(_pairs(groups, means, config, without)), config, without)
    if not rows:
        told = ", ".join(f"{count} because {reason}" for reason, count in without.items())
        raise InputError(config.output, f"no prompt makes a pair ({told})", "Use other prompts, or more responses.")
    if config.dry_run:
        print(f"{len(rows):,} pairs of {len(groups):,} prompts; the first:\n{json.dumps(rows[0], ensure_ascii=False)}")
        return {}
    held_out = [row for row in rows if _is_held_out(row["id"], config)]
    train = [row for row in rows if not _is_held_out(row["id"], config)]
    output.mkdir(parents=True, exist_ok=True)
    write_pairs(output / "pairs", train, config.format)
    write_pairs(output / "held_out", held_out, config.format, needed=False)
    summary = _summary(config, groups, means, rows, without)
    summary |= {"held_out": len(held_out), "seconds": time.perf_counter() - started}
    summary |= {name: made[name] for name in ("start_digest",) if name in made}
    write_whole(output / "summary.json", json.dumps(summary, indent=1))
    _tell(summary, output / f"pairs.{config.format}")
    return summary


# Pairs --------------------------------------------------------------------------------------------------------------


def _pairs(
    groups: Sequence[Sequence[Mapping[str, Any]]],
    means: Mapping[str, Rated],
    config: PairsConfig,
    without: Counter[str],
) -> Iterator[dict[str, Any]]:
    for group in groups:
        of = [means.get(row["key"], UNRATED) for row in group]
        allowed = _allowed(group, config)
        draw = random.Random(mix_seed(config.seed, 3, int(group[0]["prompt_key"][:12], 16)))
        found = pick(
            [each.mean for each in of],
            draw,
            literal=config.literal,
            least_chosen=config.min_chosen,
            allowed=allowed,
        )
        if isinstance(found, NoPair):
            whole = all(each.whole for each in of)
            without[found.reason if whole else "a rating is missing (tulu judge asks again)"] += 1
            continue
        chosen, rejected = (group[place] for place in found)
        if config.verified and of[found[0]].verified != 1.0:
            without["the chosen response is not verified"] += 1
        elif chosen["response"] == rejected["response"]:
            without["both sides are the same text"] += 1
        elif not chosen["response"].strip() or not rejected["response"].strip():
            without["a side is empty"] += 1
        else:
            yield _row(chosen, rejected, [of[place].mean for place in found])


def _allowed(group: Sequence[Mapping[str, Any]], config: PairsConfig) -> list[tuple[int, int]] | None:
    if config.sides == "any":
        return None
    own = [place for place, row in enumerate(group) if row["model"] == POLICY]
    return [(one, other) for one in own for other in range(len(group)) if other not in own]


def _row(chosen: Mapping[str, Any], rejected: Mapping[str, Any], ratings: Sequence[float | None]) -> dict[str, Any]:
    row = {
        "id": chosen["prompt_key"],
        "source": chosen["source"],
        "prompt": chosen["messages"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_model": chosen["model"],
        "rejected_model": rejected["model"],
        "chosen_rating": ratings[0],
        "rejected_rating": ratings[1],
        "lengths": [chosen["tokens"], rejected["tokens"]],
    }
    # Ids of two templates are two prompts; the text is then what both have in common.
    if chosen.get("ids") and rejected.get("ids") and chosen["prompt_ids"] == rejected["prompt_ids"]:
        row |= {
            "prompt_ids": list(chosen["prompt_ids"]),
            "chosen_ids": list(chosen["ids"]),
            "rejected_ids": list(rejected["ids"]),
        }
    return row


def _mixed(rows: list[dict[str, Any]], config: PairsConfig, without: Counter[str]) -> list[dict[str, Any]]:
    """The pairs with the wanted share of on-policy ones: of the kind that is too many, some are left out."""
    if config.on_policy_share is None:
        return rows
    share, kinds = config.on_policy_share, {True: [], False: []}  # type: ignore[var-annotated]
    for row in rows:
        kinds[_on_policy(row)].append(row["id"])
    for ids in kinds.values():
        ids.sort(key=lambda key: mix_seed(config.seed, 4, int(key[:12], 16)))
    most = {True: len(kinds[True]), False: len(kinds[False])}
    if share < 1:
        most[True] = min(most[True], round(most[False] * share / (1 - share)))
    if share > 0:
        most[False] = min(most[False], round(most[True] * (1 - share) / share))
    kept = {key for kind, ids in kinds.items() for key in ids[: most[kind]]}
    if len(kept) < len(rows):
        without["left out for on_policy_share"] = len(rows) - len(kept)
    return [row for row in rows if row["id"] in kept]


def _on_policy(row: Mapping[str, Any]) -> bool:
    return POLICY in (row["chosen_model"], row["rejected_model"])


def _is_held_out(key: str, config: PairsConfig) -> bool:
    return int(key[:8], 16) / 16**8 < config.held_out_share


# What it tells ------------------------------------------------------------------------------------------------------


def _summary(
    config: PairsConfig,
    groups: Sequence[Sequence[Mapping[str, Any]]],
    means: Mapping[str, Rated],
    rows: Sequence[Mapping[str, Any]],
    without: Mapping[str, int],
) -> dict[str, Any]:
    lengths = pair_lengths(tuple(row["lengths"]) for row in rows)
    assert lengths is not None
    all_rows = [row for group in groups for row in group]
    verified = [score for row in all_rows if (score := means.get(row["key"], UNRATED).verified) is not None]
    return {
        "stage": "pairs",
        "prompts": len(groups),
        "samples": len(all_rows),
        "pairs": len(rows),
        **({"right_share": sum(score == 1.0 for score in verified) / len(verified)} if verified else {}),
        "lengths": lengths._asdict(),
        "sources": dict(Counter(row["source"] for row in rows)),
        "chosen_models": dict(Counter(row["chosen_model"] for row in rows)),
        "rejected_models": dict(Counter(row["rejected_model"] for row in rows)),
        "on_policy": sum(_on_policy(row) for row in rows),
        "without": dict(without),
        "tokens": sum(row["tokens"] for row in all_rows),
        "peak_memory_bytes": peak_memory_bytes(),
        **({"model": config.generate.model} if config.generate is not None and config.generate.model else {}),
        "settings": json.loads(json.dumps(asdict(config), default=str)),
    }


def _tell(summary: Mapping[str, Any], file: Path) -> None:
    lengths = PairLengths(**summary["lengths"])
    print(f"{summary['pairs']:,} pairs of {summary['prompts']:,} prompts: {file}")
    for reason, count in summary["without"].items():
        print(f"  no pair of {count:,} prompts: {reason}")
    longer = f"chosen is longer in {lengths.chosen_longer:.0%} of the pairs, rejected in {lengths.rejected_longer:.0%}"
    print(f"mean tokens: chosen {lengths.chosen:.1f}, rejected {lengths.rejected:.1f}; {longer}", flush=True)
