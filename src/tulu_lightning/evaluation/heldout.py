"""Scores on held-out prompts, kept per item so that two checkpoints can be compared pair by pair."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypedDict

from transformers import PreTrainedTokenizerBase

from tulu_lightning.core.gain import Paired, gain
from tulu_lightning.core.stats import wilson
from tulu_lightning.errors import InputError
from tulu_lightning.rollout.engine import Engine, Progress
from tulu_lightning.rollout.scoring import Scorer, response_text, score_all
from tulu_lightning.types import Finish, Outcome, Prompt, Sampling

__all__ = ["Comparison", "HeldOut", "Item", "Scores", "compare", "evaluate"]


class Item(TypedDict):
    """One prompt, its response and the verdict."""

    row: int
    prompt: str
    target: str
    response: str
    outcome: Outcome
    score: float
    tokens: int
    finish: Finish


@dataclass(frozen=True)
class Scores:
    """What a checkpoint did on a held-out set. Build it with `evaluate`."""

    name: str
    version: int
    """Version of the held-out task."""
    settings: str
    """Hash of everything but the weights: prompts as token ids, targets, verifiers, sampling, seed, name, version."""
    weights_version: int
    items: tuple[Item, ...]
    confidence: float = 0.95
    weights: str = ""
    """Hash of the weights; empty where it was not taken."""

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def per_item(self) -> list[float]:
        """Score of each item, in order."""
        return [item["score"] for item in self.items]

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return sum(self.per_item) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the accuracy. For scores between 0 and 1 it is on the wide side: a share varies most."""
        return wilson(sum(self.per_item), self.n, self.confidence)

    @property
    def mean_tokens(self) -> float:
        """Mean response length in tokens, the stop token included."""
        return sum(item["tokens"] for item in self.items) / self.n

    @property
    def outcomes(self) -> dict[str, int]:
        """How many items had which outcome."""
        return dict(Counter(item["outcome"] for item in self.items))

    def to_json(self, path: str | Path) -> None:
        """Write the file whole or not at all.

        Raises:
            InputError: the folder cannot be written to; an older file of that name is still there.
        """
        summary = {
            "accuracy": self.accuracy,
            "interval": self.interval,
            "n": self.n,
            "mean_tokens": self.mean_tokens,
            "outcomes": self.outcomes,
        }
        text = json.dumps({"summary": summary, **asdict(self)}, ensure_ascii=False, indent=1)
        _write_whole(Path(path), text + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what `to_json` wrote.

        Raises:
            InputError: no such file, or it holds something else.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            fields.pop("summary")  # derived from the items
            items = tuple({key: item[key] for key in Item.__annotations__} for item in fields.pop("items"))
            return cls(items=items, **fields)  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(str(path), f"it cannot be read ({error.strerror})", "Evaluate the checkpoint.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it does not hold scores ({type(error).__name__}: {error})"
            raise InputError(str(path), what, "Delete it and evaluate the checkpoint again.") from error


def _write_whole(path: Path, text: str) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # temporary files are made for their owner alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        what = f"the scores cannot be written ({error.strerror})"
        raise InputError(str(path), what, "Free some space, or give a folder that you may write to.") from error


@dataclass(frozen=True)
class HeldOut:
    """A held-out task: prompts that no training row shares, how they are sampled, and its name and version."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    """Greedy (temperature 0) by custom."""
    name: str = "held-out"
    version: int = 1
    """Raise it whenever what is asked or how it is judged changes: scores of two versions do not compare."""

    @property
    def settings(self) -> str:
        """What `Scores.settings` will be."""
        return _settings(self.prompts, self.sampling, self.name, self.version, 0)

    def evaluate(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        progress: Progress | None = None,
        scorer: Scorer | None = None,
    ) -> Scores:
        """Score the engine's weights on this task, by a scorer of your own where it has verifiers of your own."""
        prompts, sampling, name = self.prompts, self.sampling, self.name
        return evaluate(
            engine, tokenizer, prompts, sampling, name, self.version, seed, progress=progress, scorer=scorer
        )


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    name: str = "held-out",
    version: int = 1,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Progress | None = None,
    scorer: Scorer | None = None,
) -> Scores:
    """Sample one response to each prompt and score it.

    Raises:
        InputError: no prompts, or what `Engine.generate` refuses.
    """
    if not prompts:
        raise InputError(name, "the held-out set is empty", "Give at least one prompt.")
    sampled = engine.generate([p.ids for p in prompts], 1, sampling, seed, progress=progress)
    completions = [group[0] for group in sampled]
    pairs = zip(prompts, completions, strict=True)
    verdicts = score_all(pairs, tokenizer) if scorer is None else scorer.score(pairs, tokenizer)
    items = tuple(
        Item(
            row=p.row,
            prompt=p.text,
            target=p.target,
            response=response_text(c, tokenizer),
            outcome=v.outcome,
            score=v.score,
            tokens=len(c.ids_L),
            finish=c.finish,
        )
        for p, c, v in zip(prompts, completions, verdicts, strict=True)
    )
    return Scores(name, version, _settings(prompts, sampling, name, version, seed), engine.version, items, confidence)


def _settings(prompts: Sequence[Prompt], sampling: Sampling, name: str, version: int, seed: int) -> str:
    asked = [(p.ids, p.checks, p.row) for p in prompts]
    drawn = (*sampling._replace(stop_ids=tuple(sorted(set(sampling.stop_ids)))), seed)
    return hashlib.sha256(json.dumps([name, version, drawn, asked]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Comparison:
    """Mean of after - before over the same items, with its paired bootstrap interval."""

    difference: float
    low: float
    high: float


def compare(before: Scores, after: Scores, confidence: float = 0.95) -> Comparison:
    """The paired difference of two evaluations of the same items under the same settings.

    Raises:
        InputError: the items or the settings differ.
    """
    keys = [[(item["row"], item["prompt"], item["target"]) for item in scores.items] for scores in (before, after)]
    remedy = "Evaluate both checkpoints on the same held-out set with the same settings."
    if keys[0] != keys[1]:
        raise InputError("compare", f"the items differ ({before.n} before, {after.n} after)", remedy)
    if before.settings != after.settings:
        raise InputError("compare", f"the settings differ ({before.settings} and {after.settings})", remedy)
    return Comparison(*gain(Paired(before.per_item, after.per_item), confidence))
