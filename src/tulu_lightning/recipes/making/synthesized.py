"""From requests and answers to data: what passes its check, repeats nothing and is in no evaluation set; the rest with reasons."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.assets.constraints import Constraint, ground_truth
from tulu_lightning.core.majority import majority
from tulu_lightning.data.near_duplicates import near_duplicates
from tulu_lightning.data.sources import Source, load
from tulu_lightning.files import write_rows
from tulu_lightning.recipes.making.skills import Skill, Written
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.verifiers.math_extract import stated

__all__ = ["Kept", "finish"]

Rows = Mapping[str, Mapping[str, Any]]


class Kept(NamedTuple):
    """A request with an answer that passed."""

    key: str
    skill: str
    persona: str
    written: Written
    answer: str
    target: str
    """What verifies an answer; empty without a check."""
    verifier: str
    share: float | None
    """Of a majority: answers that state its value."""


def finish(
    config: Any, skills: Mapping[str, Skill], requests: Sequence[Mapping[str, Any]], answers: Rows, out: Path
) -> dict[str, Any]:
    """Check, thin out and write.

    Args:
        config: a `SynthesizeConfig`.
        skills: by name.
        requests: rows of the first step.
        answers: rows of the second, by key.
        out: folder.

    Returns:
        The summary.
    """
    left: dict[str, str] = {}
    with Scorer() as scorer:
        kept = _passed(config, skills, requests, answers, scorer, left)
        kept = _different(config, kept, left)
        kept = _clean(config, kept, out, left)
        pairs = _pairs(kept, answers, scorer, left) if config.relax else []
    write_rows(out / "sft.jsonl", (_sft(each) for each in kept))
    write_rows(out / "rlvr.jsonl", (_rlvr(each) for each in kept if each.target))
    if config.relax:
        write_rows(out / "pairs.jsonl", pairs)
    else:  # not those of settings of before, to other rows
        (out / "pairs.jsonl").unlink(missing_ok=True)
    of = {row["key"]: row for row in requests}
    write_rows(out / "left_out.jsonl", ({"key": key, "reason": why, **_about(of, key)} for key, why in left.items()))
    summary = _summary(skills, requests, answers, kept, pairs, left)
    _tell(summary, out)
    return summary


# Checks -------------------------------------------------------------------------------------------------------------


def _passed(
    config: Any, skills: Mapping[str, Skill], requests: Sequence[Mapping[str, Any]], answers: Rows, scorer: Scorer,
    left: dict[str, str],
) -> list[Kept]:  # fmt: skip
    """Requests with the first answer that passes, in order."""
    made: list[tuple[Mapping[str, Any], Written, list[Mapping[str, Any]]]] = []
    for row in requests:
        written, skill = Written(**row["request"]), skills[row["skill"]]
        wanted = skill.answers or 1
        own = [answers[name] for j in range(wanted) if (name := f"{row['key']}:{j}") in answers]
        whole = [each for each in own if each["finish"] == "stop" and each["response"].strip()]
        if written.reason:
            left[row["key"]] = written.reason
        elif not whole:
            left[row["key"]] = "no answer came" if not own else "every answer was cut or empty"
        elif skill.check == "majority" and len(own) < wanted:  # of one that came, all would agree
            left[row["key"]] = "an answer did not come"
        else:
            made.append((row, written, own))
    kept: list[Kept] = []
    by_check = defaultdict(list)
    for each in made:
        by_check[skills[each[0]["skill"]].check].append(each)
    found = {
        **{row["key"]: ("", "", _first(own), None) for row, _, own in by_check["none"]},
        **_by_program(by_check["constraints"], "ifeval", scorer),
        **_by_program(by_check["tests"], "code", scorer),
        **_by_majority(by_check["majority"], config.agreement, scorer),
    }
    for row, written, _ in made:
        target, verifier, answer, share = found[row["key"]]
        if answer is None:
            reasons = {"ifeval": "no answer follows the constraints", "code": "no answer passes its tests"}
            left[row["key"]] = reasons.get(verifier, "the answers do not agree")
        else:
            kept.append(Kept(row["key"], row["skill"], row["persona"], written, answer, target, verifier, share))
    return kept


Made = Sequence[tuple[Mapping[str, Any], Written, Sequence[Mapping[str, Any]]]]
Found = dict[str, tuple[str, str, str | None, float | None]]
"""By request: target, verifier, answer, share of the majority."""


def _first(own: Sequence[Mapping[str, Any]]) -> str:
    return next(each["response"] for each in own if each["finish"] == "stop" and each["response"].strip())


def target_of(written: Written) -> str:
    """What a verifier reads: JSON of constraints or of tests."""
    if written.tests:
        return json.dumps({"tests": written.tests}, ensure_ascii=False)
    return ground_truth(written.text, [Constraint(*each) for each in written.constraints])


def _by_program(made: Made, verifier: str, scorer: Scorer) -> Found:
    targets = {row["key"]: target_of(written) for row, written, _ in made}
    jobs = [Job(verifier, each["response"], targets[row["key"]]) for row, _, own in made for each in own]
    verdicts = iter(scorer.verdicts(jobs))
    found: Found = {}
    for row, _, own in made:
        right = [
            each["response"]
            for each, verdict in [(each, next(verdicts)) for each in own]
            if verdict.outcome == "right" and each["finish"] == "stop"
        ]
        found[row["key"]] = (targets[row["key"]], verifier, right[0] if right else None, None)
    return found


def _by_majority(made: Made, agreement: float, scorer: Scorer) -> Found:
    """The value that most answers state, equal by the verifier of MATH; all comparisons of all requests at once."""
    values = {
        row["key"]: [s.text if each["finish"] == "stop" and (s := stated(each["response"])) else None for each in own]
        for row, _, own in made
    }
    asked = {
        (one, other)
        for each in values.values()
        for one in set(each) - {None}
        for other in set(each) - {None}
        if one != other
    }
    order = sorted(asked)  # type: ignore[type-var]
    verdicts = scorer.verdicts([Job("math", f"\\boxed{{{one}}}", str(other)) for one, other in order])
    equal = {pair for pair, verdict in zip(order, verdicts, strict=True) if verdict.outcome == "right"}
    found: Found = {}
    for row, _, own in made:
        value, places = majority(values[row["key"]], equal)
        share = len(places) / len(own)
        agreed = value is not None and share >= agreement
        found[row["key"]] = (value or "", "math", own[places[0]]["response"] if agreed else None, share)
    return found


# Thinning out -------------------------------------------------------------------------------------------------------


def _different(config: Any, kept: Sequence[Kept], left: dict[str, str]) -> list[Kept]:
    if config.near_duplicates is None:
        return list(kept)
    found = near_duplicates([each.written.bare for each in kept], config.near_duplicates)
    for place, other in found.items():
        left[kept[place].key] = f"nearly repeats {kept[other].key}"
    return [each for place, each in enumerate(kept) if place not in found]


def _clean(config: Any, kept: Sequence[Kept], out: Path, left: dict[str, str]) -> list[Kept]:
    if config.decontaminate is None or not kept:
        return list(kept)
    path = out / "candidates.jsonl"
    write_rows(path, ({**_sft(each), "key": each.key} for each in kept))
    # A source may repeat a small share of an evaluation; what is made here has no reason to repeat a single item.
    none = replace(config.decontaminate, set_share=0.0, action="drop_rows")
    rows = load(Source("synthesized", path=str(path), decontaminate=none))
    clean = {row["key"] for row in rows}
    path.unlink()
    left.update({each.key: "repeats an evaluation set" for each in kept if each.key not in clean})
    return [each for each in kept if each.key in clean]


def _pairs(kept: Sequence[Kept], answers: Rows, scorer: Scorer, left: dict[str, str]) -> list[dict[str, Any]]:
    """The answer that keeps every constraint, and the one to the relaxed request, which must break one of them."""
    both = [(each, answers[name]) for each in kept if (name := f"{each.key}:relaxed") in answers]
    verdicts = scorer.verdicts([Job("ifeval", other["response"], each.target) for each, other in both])
    found = []
    for (each, other), verdict in zip(both, verdicts, strict=True):
        if other["finish"] != "stop" or not other["response"].strip():
            left[f"{each.key}:relaxed"] = "the relaxed answer was cut or empty"
        elif verdict.outcome == "right":
            left[f"{each.key}:relaxed"] = "the relaxed answer follows every constraint"
        else:
            found.append(
                {
                    "id": each.key,
                    "source": f"personas/{each.skill}",
                    "prompt": [{"role": "user", "content": each.written.text}],
                    "chosen": each.answer,
                    "rejected": other["response"],
                    "persona": each.persona,
                }
            )
    return found


# Writing ------------------------------------------------------------------------------------------------------------


def _sft(each: Kept) -> dict[str, Any]:
    user, said = {"role": "user", "content": each.written.text}, {"role": "assistant", "content": each.answer}
    return {"id": each.key, "source": f"personas/{each.skill}", "messages": [user, said], "persona": each.persona}


def _rlvr(each: Kept) -> dict[str, Any]:
    row = {
        "id": each.key,
        "messages": [{"role": "user", "content": each.written.text}],
        "ground_truth": each.target,
        "dataset": each.verifier,
        "verifier": each.verifier,
        "source": f"personas/{each.skill}",
    }
    return row if each.share is None else {**row, "agreement": each.share}


def _about(of: Rows, key: str) -> dict[str, Any]:
    row = of[key.partition(":")[0]]
    return {"skill": row["skill"], "persona": row["persona"], "request": row["request"]["text"]}


def _summary(
    skills: Mapping[str, Skill], requests: Sequence[Mapping[str, Any]], answers: Rows, kept: Sequence[Kept],
    pairs: Sequence[Mapping[str, Any]], left: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    of = {row["key"]: row["skill"] for row in requests}
    told: dict[str, Any] = {}
    for name in skills:
        reasons = Counter(_short(why) for key, why in left.items() if of.get(key) == name)
        relaxed = Counter(
            why for key, why in left.items() if of.get(key.removesuffix(":relaxed")) == name != of.get(key)
        )
        told[name] = {
            "requests": sum(skill == name for skill in of.values()),
            "kept": sum(each.skill == name for each in kept),
            "left_out": dict(reasons.most_common()),
            **({"relaxed_left_out": dict(relaxed.most_common())} if relaxed else {}),
        }
    every = [*requests, *answers.values()]
    return {
        "stage": "synthesize",
        "skills": told,
        "sft": len(kept),
        "rlvr": sum(bool(each.target) for each in kept),
        "pairs": len(pairs),
        "tokens": sum(row["tokens"] for row in every),
        "cost": sum(row["cost"] for row in every),
    }


def _short(reason: str) -> str:
    return "nearly repeats another" if reason.startswith("nearly repeats") else reason


def _tell(summary: Mapping[str, Any], out: Path) -> None:
    for name, counts in summary["skills"].items():
        why = ", ".join(f"{count:,} {reason}" for reason, count in counts["left_out"].items())
        print(f"{name}: {counts['kept']:,} of {counts['requests']:,} requests kept{f' ({why})' if why else ''}")
    print(
        f"{summary['sft']:,} rows of SFT, {summary['rlvr']:,} prompts with a target, {summary['pairs']:,} pairs: {out}"
    )
