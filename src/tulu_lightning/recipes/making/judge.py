"""`tulu judge`: ratings of responses, by models asked about one aspect at a time or by the verifiers of the rows.

Tülu 3, section 5.2.1. All responses to a prompt stand in one question, in an order drawn for it, so that a judge's liking
for a place does not favour a model.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tulu_lightning.core.binarise import Rating
from tulu_lightning.core.settings import require
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.making.asks import own_verifiers
from tulu_lightning.recipes.making.aspects import ASPECTS, LAYOUT, SYSTEM, order_shown, questionnaire, read_ratings
from tulu_lightning.recipes.making.judged import VERIFIER, agreements, check_texts, ratings_told, tell
from tulu_lightning.recipes.making.models import answers, rendered
from tulu_lightning.recipes.making.pool import Decoding, Model, Question, identity, version
from tulu_lightning.recipes.making.responses import groups_of
from tulu_lightning.recipes.making.store import RowStore, read_settings, text_digest
from tulu_lightning.rollout.scoring import Job, Scorer, combined
from tulu_lightning.types import Check
from tulu_lightning.verifiers.registry import Verifier

__all__ = ["VERIFIER", "JudgeConfig", "judge", "main"]

JOBS = 512
"""Responses that are verified between two writes."""


@dataclass(frozen=True)
class JudgeConfig:
    """Rate responses that `tulu generate` made."""

    input: str = ""
    """Folder that `tulu generate` wrote."""
    output: str = ""
    """Folder for rows-*.jsonl (or rows-*.parquet) and summary.json."""
    judges: list[Model] = field(default_factory=list)
    """Who rates; how far any two agree is reported."""
    verify: bool = False
    """Let the rows' own verifiers rate: 1 for a right answer that stopped, else its share of the checks, 0 if it was cut."""
    aspects: list[str] = field(default_factory=lambda: list(ASPECTS))
    """What each judge is asked for, one call each."""
    rubrics: dict[str, str] = field(default_factory=dict)
    """Own aspects: name to rubric; they win over the built-in ones. One that says N/A allows it."""
    question: str = LAYOUT
    """Own words of the question, with {aspect}, {rubric}, {instruction} and {texts}, and {or_na} where N/A may be allowed.
    The texts are called Text 1, Text 2 and so on."""
    system: str = SYSTEM
    """Own system message; none if empty."""
    rounds: int = 1
    """How often each question is asked, each time in another order; agreement of a judge with itself is reported."""
    max_new_tokens: int = 1024
    """Of a judge's answer."""
    temperature: float = 0.0
    verifiers: dict[str, Verifier] = field(default_factory=dict)
    """Own verifiers by name, as class_path and init_args."""
    seed: int = 0
    limit: int | None = None
    """Only the first so many prompts."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """`parquet`: rows-*.parquet in place of the JSON lines, once all rows are there."""
    dry_run: bool = False
    """Show the first question and what would be asked, and ask nothing."""

    def check(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            InputError: names the key and what would do.
        """
        for name in ("input", "output"):
            require(getattr(self, name) != "", name, "empty", "Give a folder.")
        if not self.judges and not self.verify:
            raise InputError("judges", "there is none", "Give judges, or set verify to let the rows' verifiers rate.")
        names = [judge.name for judge in self.judges]
        for name in names:
            if names.count(name) > 1 or name == VERIFIER:
                raise InputError("judges", f"the name {name!r} stands twice", "Give each a name of its own.")
        known = {**ASPECTS, **self.rubrics}
        for aspect in self.aspects:
            if aspect not in known:
                remedy = f"{nearest(aspect, known)} Or give it a rubric in rubrics."
                raise InputError("aspects", f"there is none called {aspect!r}", remedy)
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise InputError("aspects", "is empty or names one twice", f"Choose among {', '.join(known)}.")
        for slot in ("{instruction}", "{texts}"):
            if slot not in self.question:
                raise InputError("question", f"has no {slot}", "Say in it where the instruction and the texts stand.")
        require(self.rounds >= 1, "rounds", self.rounds, "Use at least 1.")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "Use at least 1, or leave it out.")


class _Call(NamedTuple):
    """What one question to a judge is about."""

    group: list[dict[str, Any]]
    aspect: str
    round: int
    order: list[int]


def main(argv: Sequence[str]) -> int:
    """`tulu judge --config FILE`."""
    config, _ = read_config(JudgeConfig, "tulu judge", argv)
    judge(config)
    return 0


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Make the ratings that are not there yet.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        InputError: the input holds no responses, a row lacks what is needed, the output holds ratings of other
            settings, or a server fails for good.
    """
    config.check()
    groups, incomplete = groups_of(config.input, config.limit)
    if config.dry_run:
        _show(config, groups)
        return {}
    started = time.perf_counter()
    with RowStore(config.output, "judge", _settings(config)) as store:
        for _ in check_texts(store.rows() if store.done else (), groups, config.output, config.input):
            pass
        if config.verify:
            _verify(config, groups, store)
        for model in config.judges:
            _ask(config, model, groups, store)
        planned = _planned(config, groups)
        rows = [{**row, "answer": None} for row in store.rows() if row["key"] in planned] if store.done else []
        if config.format == "parquet":
            store.to_parquet()
    summary = {
        "stage": "judge",
        "prompts": len(groups),
        "incomplete": incomplete,
        "failed": len(planned) - len(rows),
        "ratings": ratings_told(rows),
        "agreement": agreements(rows),
        "tokens": sum(row.get("tokens", 0) for row in rows),
        "cost": sum(row.get("cost", 0.0) for row in rows),
        "seconds": time.perf_counter() - started,
    }
    write_whole(Path(config.output, "summary.json"), json.dumps(summary, indent=1))
    tell(summary, config.output)
    return summary


# Verifiers ----------------------------------------------------------------------------------------------------------


def _verify(config: JudgeConfig, groups: Sequence[Sequence[Mapping[str, Any]]], store: RowStore) -> None:
    missing = [group for group in groups if _key(group, VERIFIER, VERIFIER, 0) not in store.done]
    for group in missing:
        if not group[0].get("checks"):
            what = f"prompt {group[0]['prompt_key']} says nothing of what verifies an answer"
            raise InputError(config.input, what, "Give prompts with ground_truth, or leave verify out.")
    done = len(groups) - len(missing)
    with Scorer(own_verifiers(config.verifiers)) as scorer, Progress("verify", len(groups), done=done) as progress:
        size = max(1, JOBS // max((len(group) for group in missing), default=1))
        for at in range(0, len(missing), size):
            part = missing[at : at + size]
            checks = {
                group[0]["prompt_key"]: [
                    Check(c["verifier"], c["ground_truth"], c["weight"]) for c in group[0]["checks"]
                ]
                for group in part
            }
            jobs = [
                Job(check.verifier, row["response"], check.target)
                for group in part
                for row in group
                for check in checks[row["prompt_key"]]
            ]
            verdicts = iter(scorer.verdicts(jobs))
            for group in part:
                own = checks[group[0]["prompt_key"]]
                found = [combined(own, [next(verdicts) for _ in own]) for _ in group]
                scores = [v.score if row["finish"] == "stop" else 0.0 for row, v in zip(group, found, strict=True)]
                row = _row(group, VERIFIER, VERIFIER, 0, range(len(group)), scores)
                store.add([{**row, "outcomes": [verdict.outcome for verdict in found]}])
            progress.update(done + at + len(part))


# Models -------------------------------------------------------------------------------------------------------------


def _ask(config: JudgeConfig, model: Model, groups: Sequence[list[dict[str, Any]]], store: RowStore) -> None:
    every = _asked_of(config, model.name, groups)
    done = len(every & store.done)
    decoding, who = Decoding(config.max_new_tokens, config.temperature), identity(model)
    with Progress(model.name, len(every), done=done, unit="questions") as progress:
        for question, (answer,) in answers(
            model, _questions(config, groups, model.name, store.done), decoding, config.seed, done
        ):
            call = question.about
            row = _row(
                call.group, model.name, call.aspect, call.round, call.order,
                read_ratings(answer.text, len(call.group)),
            )  # fmt: skip
            cost = model.cost(answer)
            told = {"answer": answer.text, "finish": answer.finish, "tokens": answer.tokens, "cost": cost}
            store.add([{**row, "version": version(who, answer), **told}])
            done += 1
            progress.update(done)


def _questions(
    config: JudgeConfig, groups: Sequence[list[dict[str, Any]]], name: str, done: AbstractSet[str]
) -> Iterator[Question]:
    """What a judge has not answered yet; each is rendered when it is asked."""
    rubrics = {**ASPECTS, **config.rubrics}
    for group in groups:
        key = int(group[0]["prompt_key"][:12], 16)
        for place, aspect in enumerate(config.aspects):
            for number in range(config.rounds):
                if _key(group, name, aspect, number) in done:
                    continue
                order = order_shown(len(group), config.seed, key, place, number)
                shown = [group[at]["response"] for at in order]
                asked = group[0]["messages"]
                messages = questionnaire(aspect, rubrics[aspect], asked, shown, config.question, config.system)
                drawn = f"{mix_seed(key, place, number):016x}"
                yield Question(drawn, messages, about=_Call(group, aspect, number, order))


def _planned(config: JudgeConfig, groups: Sequence[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Keys of all ratings that are asked for; a run with a lower limit does not tell of what others made."""
    asked = {key for model in config.judges for key in _asked_of(config, model.name, groups)}
    return asked | ({_key(group, VERIFIER, VERIFIER, 0) for group in groups} if config.verify else set())


def _asked_of(config: JudgeConfig, name: str, groups: Sequence[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Keys of all ratings that one judge is asked for."""
    each = [(aspect, number) for aspect in config.aspects for number in range(config.rounds)]
    return {_key(group, name, aspect, number) for group in groups for aspect, number in each}


# Records ------------------------------------------------------------------------------------------------------------


def _key(group: Sequence[Mapping[str, Any]], judge: str, aspect: str, number: int) -> str:
    return f"{group[0]['prompt_key']}:{judge}:{aspect}:{number}"


def _row(
    group: Sequence[Mapping[str, Any]],
    judge: str,
    aspect: str,
    number: int,
    order: Sequence[int],
    ratings: Sequence[Rating],
) -> dict[str, Any]:
    """A rating row; responses stand in the order in which they were shown."""
    return {
        "key": _key(group, judge, aspect, number),
        "prompt_key": group[0]["prompt_key"],
        "judge": judge,
        "aspect": aspect,
        "round": number,
        "responses": [group[at]["key"] for at in order],
        "texts": [text_digest(group[at]["response"]) for at in order],
        "ratings": list(ratings),
    }


def _settings(config: JudgeConfig) -> dict[str, Any]:
    kept = ("verify", "aspects", "rubrics", "question", "system", "rounds", "max_new_tokens", "temperature", "seed")
    values = asdict(config)
    made = read_settings(config.input)
    return {
        **{name: values[name] for name in kept},
        "judges": [identity(model) for model in config.judges],
        "responses": made.get("models", config.input),
    }


def _show(config: JudgeConfig, groups: Sequence[list[dict[str, Any]]]) -> None:
    calls = list(_questions(config, groups[:1], "", set()))
    print(f"{len(groups):,} prompts, {len(groups) * len(calls):,} questions to each of {len(config.judges)} judges")
    if config.judges:
        print(f"first question, to {config.judges[0].name}:\n{rendered(config.judges[0], calls[0])}")
    elif config.verify:
        print(f"first check: {json.dumps(groups[0][0].get('checks'), ensure_ascii=False)}")
