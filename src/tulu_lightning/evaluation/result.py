"""What a model scored on a task: items, mean, interval, and the paired difference of two models."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, Self, TypedDict

from tulu_lightning.core.gain import Paired, gain
from tulu_lightning.core.stats import wilson
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.task import Average
from tulu_lightning.files import write_whole

__all__ = ["Answer", "Difference", "Item", "TaskResult", "compare_results", "pass_at_k"]


class Answer(TypedDict):
    """One sampled answer, or the log-probs of the choices."""

    text: str
    outcome: str
    score: float
    tokens: int
    finish: str


class Item(TypedDict):
    """One example and what the model made of it."""

    key: str
    group: str
    target: str
    score: float
    answers: list[Answer]
    asked: NotRequired[str]
    """`Example.digest`; results of older versions have none."""
    prompt: NotRequired[str]
    """The end of what was asked, for people; likewise."""


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that at least one of k answers drawn from the samples is right (Chen et al. 2021, equation 1).

    1 - C(n - c, k) / C(n, k), with n samples of which c are right: unbiased, unlike 1 - (1 - c / n)^k.

    Example: 1 right of 4, k = 2: 1 - C(3, 2) / C(4, 2) = 0.5.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"{right} right of {samples}, k = {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class TaskResult:
    """A task's score with everything that it was computed from."""

    task: str
    version: int
    settings: str
    """Hash of what the score belongs to: `Task.settings`, and of a model that is not in training its template's name, its kind
    of engine, dtype and seed."""
    metric: str
    average: Average
    model: str
    model_digest: str
    """Hash of the weights."""
    template: str
    items: tuple[Item, ...]
    confidence: float = 0.95
    bounded: bool = True
    """Whether a score lies in [0, 1] by what it is; one of the harness's metrics may not (BLEU goes to 100)."""

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def per_item(self) -> list[float]:
        """Score of each item, in order."""
        return [item["score"] for item in self.items]

    @property
    def score(self) -> float:
        """The task's score in [0, 1]: the mean of items, or of the groups' means."""
        if self.average == "micro":
            return sum(self.per_item) / self.n
        means = self.groups.values()
        return sum(mean for mean, _ in means) / len(means)

    @property
    def groups(self) -> dict[str, tuple[float, int]]:
        """Mean score and number of items of each group."""
        scores = defaultdict[str, list[float]](list)
        for item in self.items:
            scores[item["group"]].append(item["score"])
        return {name: (sum(each) / len(each), len(each)) for name, each in sorted(scores.items())}

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's where every item is right or wrong and counts the same; else that of a gain over nothing."""
        if self.average == "micro" and set(self.per_item) <= {0.0, 1.0}:
            return wilson(sum(self.per_item), self.n, self.confidence)
        _, low, high = gain(Paired([0.0] * self.n, self.per_item, self._groups_of_items), self.confidence)
        return (max(0.0, low), min(1.0, high)) if self.bounded else (low, high)

    @property
    def _groups_of_items(self) -> list[str] | None:
        return None if self.average == "micro" else [item["group"] for item in self.items]

    def summary(self) -> dict[str, object]:
        """The score and what belongs beside it, without the items."""
        low, high = self.interval
        fields = {key: value for key, value in asdict(self).items() if key != "items"}
        return {**fields, "score": self.score, "interval": [low, high], "n": self.n, "groups": self.groups}

    def to_json(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = {"summary": self.summary(), **asdict(self)}
        write_whole(Path(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read what `to_json` wrote.

        Raises:
            InputError: no such file, or it holds something else.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            fields.pop("summary")  # computed from the items
            return cls(items=tuple(fields.pop("items")), **fields)
        except OSError as error:
            raise InputError(str(path), f"it cannot be read ({error.strerror})", "Evaluate the model.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it does not hold a task's result ({type(error).__name__}: {error})"
            raise InputError(str(path), what, "Delete it and evaluate the model again.") from error


@dataclass(frozen=True)
class Difference:
    """Score of `after` minus that of `before` over the same items, with its paired bootstrap interval."""

    difference: float
    low: float
    high: float
    n: int


def compare_results(before: TaskResult, after: TaskResult, confidence: float = 0.95) -> Difference:
    """The paired difference of two models on one task.

    Raises:
        InputError: they were asked other items, or under other settings.
    """
    remedy = "Evaluate both models on the same task with the same settings (and the same --limit)."
    for name in ("task", "version", "settings"):
        values = getattr(before, name), getattr(after, name)
        if values[0] != values[1]:
            raise InputError("compare", f"the {name} differs ({values[0]} and {values[1]})", remedy)
    keys: Sequence[list[str]] = [[item["key"] for item in result.items] for result in (before, after)]
    if keys[0] != keys[1]:
        raise InputError("compare", f"the items differ ({before.n} and {after.n})", remedy)
    pairs = Paired(before.per_item, after.per_item, after._groups_of_items)
    return Difference(*gain(pairs, confidence), after.n)
