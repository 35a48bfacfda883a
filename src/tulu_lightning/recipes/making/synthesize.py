"""`tulu synthesize`: requests that personas would make, answers to them, checked by programs, as data of every stage.

Tülu 3, section 3.1.2 and appendix C, after PersonaHub (Chan et al. 2024): a description of a person beside each request keeps a
writer from repeating itself. First the requests are written, then the answers; both are rows that a killed command goes on with.
"""

import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.assets.constraints import Dice
from tulu_lightning.core.settings import require
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data.constraints import with_sentences
from tulu_lightning.data.decontaminate_settings import Decontaminate
from tulu_lightning.data.sources import Source, load
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.making.models import answers, rendered
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question, identity, version
from tulu_lightning.recipes.making.skills import Skill, Written, filled, read_request
from tulu_lightning.recipes.making.store import RowStore, text_digest
from tulu_lightning.recipes.making.synthesized import finish

__all__ = ["Personas", "SynthesizeConfig", "main", "synthesize"]


@dataclass(frozen=True)
class Personas:
    """Descriptions of people. Without any setting, 24 invented ones.

    Example: `Personas(hub="proj-persona/PersonaHub", subset="persona", field="persona")`.
    """

    path: str | None = None
    """A file of rows, or a text file (.txt) with one description a line."""
    hub: str | None = None
    """As in `Source`."""
    subset: str | None = None
    """As in `Source`."""
    split: str | None = None
    """As in `Source`."""
    field: str = "persona"
    """Name of the field that holds the description."""
    limit: int | None = None
    """Only the first so many."""

    def texts(self) -> list[str]:
        """The descriptions, each once.

        Raises:
            InputError: the file or set is not there, a row has no such field or no text in it, or nothing is left.
        """
        require(self.limit is None or self.limit >= 1, "personas.limit", self.limit, "Use at least 1, or leave it out.")
        if self.path is not None and self.path.endswith(".txt"):
            try:
                lines = Path(self.path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                what = f"there is no {self.path}, or it is no text in UTF-8 ({error})"
                raise InputError("personas.path", what, "Give a text file with one persona a line.") from None
            found = [line.strip() for line in lines if line.strip()][: self.limit]
        else:
            rows = None if self.path or self.hub else "tulu_lightning.assets.personas.persona_rows"
            names = ("path", "hub", "subset", "split", "limit")
            source = Source("personas", rows=rows, **{name: getattr(self, name) for name in names})
            found = [self._text(source, number, row) for number, row in enumerate(load(source), start=1)]
        if not found:
            raise InputError("personas", "there is none", "Give at least one description.")
        return list(dict.fromkeys(found))

    def _text(self, source: Source, number: int, row: Any) -> str:
        text = row.get(self.field)
        if not isinstance(text, str) or not text.strip():
            what = f"{self.field} is {text!r}" if self.field in row else f"has no field {self.field!r}"
            raise InputError(source.row_name(number), what, "Name the field with the description: personas.field.")
        return text.strip()


@dataclass(frozen=True)
class SynthesizeConfig:
    """Make prompts and answers by personas and skills."""

    writer: Model
    """Writes the requests."""
    output: str = ""
    """Folder for sft.jsonl, rlvr.jsonl, pairs.jsonl, left_out.jsonl, summary.json, and the rows on the way to them."""
    answerer: Model | None = None
    """Writes the answers; the same model if left out."""
    personas: Personas = field(default_factory=Personas)
    skills: list[Skill] = field(default_factory=lambda: [Skill("precise_if")])
    """By name, or your own."""
    decoding: Decoding = field(default_factory=lambda: Decoding(1024, 0.7, 0.95))
    """Of requests; the release's."""
    answer_decoding: Decoding = field(default_factory=lambda: Decoding(1024, 0.7, 0.95))
    """Of answers."""
    agreement: float = 0.5
    """Of a majority: least share of a request's answers that state its value."""
    relax: bool = False
    """Also answer requests of two or more constraints without one of them: the rejected side of a pair (section 5.2.2)."""
    near_duplicates: float | None = 0.7
    """Leave out a request whose 3-grams are shared with an earlier one to this Jaccard similarity; null keeps all."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets that no request may repeat; the last step."""
    seed: int = 0
    limit: int | None = None
    """Only the first so many requests of each skill."""
    dry_run: bool = False
    """Show the first request to the writer and what would be made, and make nothing."""

    def check(self) -> list[Skill]:
        """Refuse settings that cannot be meant.

        Returns:
            The skills, with what their names stand for.

        Raises:
            InputError: names the key and what would do.
        """
        require(self.output != "", "output", "empty", "Give a folder.")
        require(0 < self.agreement <= 1, "agreement", self.agreement, "It is a share of the answers: above 0, to 1.")
        share = self.near_duplicates
        require(share is None or 0 < share <= 1, "near_duplicates", share, "It is a share: above 0, to 1; or null.")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "Use at least 1, or leave it out.")
        names = [skill.name for skill in self.skills]
        if not names or len(set(names)) < len(names):
            raise InputError("skills", "is empty or names one twice", "Give each skill once, with its count.")
        skills = [skill.whole() for skill in self.skills]
        if self.relax and not any(skill.check == "constraints" for skill in skills):
            raise InputError("relax", "is set, and no skill has constraints", "Add precise_if, or leave it out.")
        return skills


class _Slot(NamedTuple):
    """One request to be made."""

    key: str
    skill: Skill
    persona: str
    example: str

    @property
    def question(self) -> Question:
        """What the writer is asked."""
        return Question(
            self.key, [{"role": "user", "content": filled(self.skill, self.persona, self.example)}], about=self
        )


def main(argv: Sequence[str]) -> int:
    """`tulu synthesize --config FILE`."""
    config, _ = read_config(SynthesizeConfig, "tulu synthesize", argv)
    synthesize(config)
    return 0


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """Make what is not there yet, and write the data.

    Returns:
        The summary that is also written to `summary.json`; empty after a dry run.

    Raises:
        InputError: bad settings or personas, the output holds rows of other settings, or a server fails for good.
    """
    skills = config.check()
    slots = _slots(config, skills)
    if config.dry_run:
        _show(config, skills, slots)
        return {}
    started, out = time.perf_counter(), Path(config.output)
    requests = _requests(config, slots, out / "requests")
    made = _answers(config, skills, requests, out / "answers")
    summary = finish(config, {skill.name: skill for skill in skills}, requests, made, out)
    if missing := len(slots) - len(requests):
        print(f"{missing:,} requests were not written (see above why); the same command asks again", flush=True)
    summary |= {"not_written": missing, "seconds": time.perf_counter() - started}
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    return summary


def _slots(config: SynthesizeConfig, skills: Sequence[Skill]) -> list[_Slot]:
    """Who asks for what: every persona once before any comes again, in an order drawn for each skill."""
    personas, found = config.personas.texts(), []
    for skill in skills:
        order = list(range(len(personas)))
        named = int(hashlib.sha256(skill.name.encode()).hexdigest()[:12], 16)
        random.Random(mix_seed(config.seed, 4, named)).shuffle(order)
        for number in range(min(skill.count, config.limit or skill.count)):
            persona = personas[order[number % len(order)]]
            dice = Dice(config.seed, skill.name, number)
            example = dice.pick(skill.examples) if skill.examples else ""
            # What a row is made from: with another wording its requests and answers are others.
            words = [skill.name, skill.ask, skill.begins, skill.answer, skill.check, skill.constraints, skill.kinds]
            named_by = json.dumps([config.seed, *words, number, persona, example])
            found.append(_Slot(hashlib.sha256(named_by.encode()).hexdigest()[:16], skill, persona, example))
    return found


def _settings(config: SynthesizeConfig, who: Model, decoding: Decoding) -> dict[str, Any]:
    return {"model": identity(who), "decoding": asdict(decoding), "seed": config.seed}


def _requests(config: SynthesizeConfig, slots: Sequence[_Slot], folder: Path) -> list[dict[str, Any]]:
    settings = _settings(config, config.writer, config.decoding)
    with RowStore(folder, "synthesize requests", settings) as store:
        left = [slot for slot in slots if slot.key not in store.done]
        done = len(slots) - len(left)
        with Progress("requests", len(slots), done=done) as progress:
            questions = (slot.question for slot in left)
            for question, (answer,) in answers(config.writer, questions, config.decoding, config.seed, done):
                slot = question.about
                written = read_request(slot.skill, answer.text, answer.finish, slot.key)
                row = {"key": slot.key, "skill": slot.skill.name, "persona": slot.persona, "request": asdict(written)}
                store.add([row | _told(config.writer, settings["model"], answer, config.seed)])
                done += 1
                progress.update(done)
        rows = {row["key"]: row for row in store.rows()} if store.done else {}
    return [rows[slot.key] for slot in slots if slot.key in rows]


def _told(model: Model, who: Mapping[str, Any], answer: Answer, seed: int) -> dict[str, Any]:
    """What rows say of an answer."""
    return {
        "response": answer.text,
        "finish": answer.finish,
        "model": model.name,
        "version": version(who, answer),
        "seed": seed,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "cost": model.cost(answer),
    }


def _answers(
    config: SynthesizeConfig, skills: Sequence[Skill], requests: Sequence[dict[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Answers by key: REQUEST:NUMBER, and REQUEST:relaxed where a constraint was left away."""
    who, by_name = config.answerer or config.writer, {skill.name: skill for skill in skills}
    asked: list[Question] = []
    for row in requests:
        skill, written = by_name[row["skill"]], Written(**row["request"])
        if written.reason:
            continue
        names = [f"{row['key']}:{number}" for number in range(skill.answers or 1)]
        asked.append(_asked(row["key"], f"{written.text}{skill.answer}", names))
        if config.relax and len(written.constraints) > 1:
            key = hashlib.sha256(f"{row['key']} relaxed".encode()).hexdigest()[:16]
            asked.append(_asked(key, relaxed(written, row["key"]), [f"{row['key']}:relaxed"]))
    settings = _settings(config, who, config.answer_decoding)
    of = {name: text_digest(each.messages[-1]["content"]) for each in asked for name in each.about}
    with RowStore(folder, "synthesize answers", settings) as store:
        for row in store.rows() if store.done else ():
            if row.get("asked", of.get(row["key"])) != of.get(row["key"], row.get("asked")):
                what = f"its answers are to other requests than there are now ({row['key']})"
                raise InputError(str(folder), what, "Remove it, or give another output: requests were made anew.")
        done = len(store.done & of.keys())
        with Progress("answers", len(of), done=done) as progress:
            for question, found in answers(who, _left(asked, store.done), config.answer_decoding, config.seed, done):
                for answer in found:
                    name = question.about[answer.number]
                    told = _told(who, settings["model"], answer, config.seed)
                    store.add([{"key": name, "asked": of[name], **told}])
                done += len(found)
                progress.update(done)
        return {row["key"]: row for row in store.rows() if row["key"] in of} if store.done else {}


def _asked(key: str, text: str, names: Sequence[str]) -> Question:
    """A question whose answer number n is the row `names[n]`."""
    return Question(key, [{"role": "user", "content": text}], range(len(names)), names)


def _left(asked: Sequence[Question], done: set[str]) -> Iterator[Question]:
    for question in asked:
        numbers = [number for number, name in enumerate(question.about) if name not in done]
        if numbers:
            yield question._replace(numbers=numbers)


def relaxed(written: Written, key: str) -> str:
    """The request without one of its constraints, drawn by its key."""
    gone = Dice(key, "relaxed").below(len(written.constraints))
    kept = [text for place, (_, _, text) in enumerate(written.constraints) if place != gone]
    return with_sentences(written.bare, kept)


def _show(config: SynthesizeConfig, skills: Sequence[Skill], slots: Sequence[_Slot]) -> None:
    print(f"{len(slots):,} requests by {len(config.personas.texts()):,} personas")
    for skill in skills:
        mine = sum(slot.skill.name == skill.name for slot in slots)
        print(f"  {skill.name}: {mine:,}, {skill.answers} answers each, checked: {skill.check}")
    print(f"first request, to {config.writer.name}:\n{rendered(config.writer, slots[0].question)}")
