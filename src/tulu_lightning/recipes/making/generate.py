"""`tulu generate`: responses to prompts by a pool of models, one row each, that a killed command goes on with.

Tülu 3, section 5.2.1: several models, drawn anew for each prompt, answer it; on-policy data has the current checkpoint
among them.
"""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tulu_lightning.core.settings import require
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.making.asks import Ask, own_verifiers, read_asks
from tulu_lightning.recipes.making.models import answers, rendered
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question, identity, version
from tulu_lightning.recipes.making.store import RowStore
from tulu_lightning.verifiers.registry import Verifier

__all__ = ["POLICY", "GenerateConfig", "assigned", "generate", "main"]

POLICY = "policy"
"""What rows call the current checkpoint."""


@dataclass(frozen=True)
class GenerateConfig:
    """Sample responses to prompts from a pool of models."""

    sources: list[PromptSource]
    """Prompts; rows of SFT count as their prompts. What verifies an answer is kept where a row says it."""
    output: str = ""
    """Folder for rows-*.jsonl (or rows-*.parquet) and summary.json."""
    model: str | None = None
    """The current checkpoint, which rows call `policy`: model folder, or a known name."""
    template: str | None = None
    """Its chat template; its own if left out."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Its weights'."""
    engine: Literal["local", "vllm"] = "local"
    """What samples from it."""
    models: list[Model] = field(default_factory=list)
    """The others of the pool."""
    responses: int = 4
    """Responses of a prompt; the paper has four."""
    draw: Literal["random", "each"] = "random"
    """`random`: each prompt is answered by so many different models, drawn for it. `each`: every model answers every
    prompt so many times."""
    on_policy_share: float = 1.0
    """With `random`: share of the prompts that the current checkpoint is one of the drawn models for."""
    decoding: Decoding = field(default_factory=Decoding)
    verifiers: dict[str, Verifier] = field(default_factory=dict)
    """Own verifiers by name, as class_path and init_args."""
    seed: int = 0
    limit: int | None = None
    """Only the first so many prompts."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """`parquet`: rows-*.parquet in place of the JSON lines, once all rows are there."""
    dry_run: bool = False
    """Show the first request and what would be made, and make nothing."""

    def pool(self) -> dict[str, Model]:
        """All models by name, the current checkpoint first.

        Raises:
            InputError: there is none, or a name stands twice.
        """
        own = [] if self.model is None else [
            Model(POLICY, path=self.model, template=self.template, dtype=self.dtype, engine=self.engine)
        ]  # fmt: skip
        found: dict[str, Model] = {}
        for model in [*own, *self.models]:
            if model.name in found:
                raise InputError("models", f"two are called {model.name!r}", "Give each a name of its own.")
            found[model.name] = model
        if not found:
            raise InputError("models", "there is none", "Give model (a checkpoint), models, or both.")
        return found

    def check(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            InputError: names the key and what would do.
        """
        require(self.output != "", "output", "empty", "Give a folder.")
        pool = self.pool()
        others = len(pool) - (self.model is not None)
        require(self.responses >= 1, "responses", self.responses, "Use at least 1.")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "Use at least 1, or leave it out.")
        share = self.on_policy_share
        require(0 <= share <= 1, "on_policy_share", share, "It is a share of the prompts: 0 to 1.")
        if self.draw == "random":
            needed = self.responses - (self.model is not None and share == 1)
            if others < needed:
                what = f"is {self.responses}, and there are {others} models beside the current checkpoint to draw from"
                raise InputError("responses", what, "Add models, ask for fewer responses, or set draw to each.")


def main(argv: Sequence[str]) -> int:
    """`tulu generate --config FILE`."""
    config, _ = read_config(GenerateConfig, "tulu generate", argv)
    generate(config)
    return 0


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Make the responses that are not there yet.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        InputError: bad prompts or models, the output holds rows of other settings, or a server fails for good.
    """
    config.check()
    pool = config.pool()
    asks = read_asks(config.sources, config.seed, config.limit, own_verifiers(config.verifiers))
    plan = {ask.key: assigned(config, ask.key) for ask in asks.kept}
    if config.dry_run:
        _show_plan(plan, pool, asks.kept[0])
        return {}
    who = {name: identity(model) for name, model in pool.items()}
    started = time.perf_counter()
    with RowStore(config.output, "generate", _settings(config, who)) as store:
        every = {_key(key, name, j) for key, counts in plan.items() for name, n in counts.items() for j in range(n)}
        done = len(every & store.done)
        with Progress("generate", len(every), done=done, unit="responses") as progress:
            for name, model in pool.items():
                questions = _questions(asks.kept, plan, name, store.done)
                known = sum(key.partition(":")[2].rpartition(":")[0] == name for key in store.done)
                for question, made in answers(model, questions, config.decoding, _seed(config, name), known):
                    store.add(_row(question.about, model, answer, who[name], config) for answer in made)
                    done += len(made)
                    progress.update(done, name)
        summary = _summary(store, plan, who, time.perf_counter() - started)
        if config.format == "parquet":
            store.to_parquet()
    summary |= {"repeated": asks.repeated, "left_out": asks.left_out}
    write_whole(Path(config.output, "summary.json"), json.dumps(summary, indent=1))
    if summary["failed"]:
        print(f"{summary['failed']:,} prompts lack a response (see above why); the same command tries them again")
    print(f"{summary['responses']:,} responses to {summary['prompts']:,} prompts: {config.output}", flush=True)
    return summary


def assigned(config: GenerateConfig, key: str) -> dict[str, int]:
    """Which models answer a prompt, and how often each: a function of the seed and the prompt alone."""
    pool = list(config.pool())
    if config.draw == "each":
        return dict.fromkeys(pool, config.responses)
    others = [name for name in pool if name != POLICY or config.model is None]
    draw = random.Random(mix_seed(config.seed, 1, int(key[:12], 16)))
    on_policy = config.model is not None and draw.random() < config.on_policy_share
    picked = draw.sample(others, config.responses - on_policy)
    return dict.fromkeys([*([POLICY] if on_policy else []), *picked], 1)


def _seed(config: GenerateConfig, name: str) -> int:
    """Of a model's samples: with one seed for all, two checkpoints that hardly differ would say the same."""
    if name == POLICY:
        return config.seed
    return mix_seed(config.seed, 5, int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))


def _key(prompt: str, model: str, number: int) -> str:
    return f"{prompt}:{model}:{number}"


def _questions(
    asks: Sequence[Ask], plan: Mapping[str, Mapping[str, int]], name: str, done: set[str]
) -> Iterator[Question]:
    """What a model has not answered yet."""
    for ask in asks:
        numbers = [j for j in range(plan[ask.key].get(name, 0)) if _key(ask.key, name, j) not in done]
        if numbers:
            yield Question(ask.key, ask.messages, numbers, ask)


def _row(ask: Ask, model: Model, answer: Answer, who: Mapping[str, Any], config: GenerateConfig) -> dict[str, Any]:
    row = {
        "key": _key(ask.key, model.name, answer.number),
        "prompt_key": ask.key,
        "messages": ask.messages,
        "source": ask.source,
        "model": model.name,
        "version": version(who, answer),
        "number": answer.number,
        "seed": config.seed,
        "response": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "cost": model.cost(answer),
    }
    if ask.checks:
        row["checks"] = [{"verifier": c.verifier, "ground_truth": c.target, "weight": c.weight} for c in ask.checks]
    if answer.ids is not None:
        row |= {"prompt_ids": answer.prompt_ids, "ids": answer.ids}
    return row | ask.columns


def _settings(config: GenerateConfig, who: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("responses", "draw", "on_policy_share", "decoding", "seed", "sources")
    values = asdict(config)
    return {**{name: values[name] for name in kept}, "models": list(who.values())}


def _summary(
    store: RowStore, plan: Mapping[str, Mapping[str, int]], who: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    per_model: dict[str, Counter[str]] = {name: Counter() for name in who}
    there: Counter[str] = Counter()
    for row in store.rows():
        if row["prompt_key"] not in plan:  # of a run with a higher limit
            continue
        counts = per_model.setdefault(row["model"], Counter())
        counts.update(responses=1, tokens=row["tokens"], prompt_tokens=row["prompt_tokens"])
        counts.update(cut=row["finish"] != "stop", cost=row["cost"])  # type: ignore[arg-type]
        there[row["prompt_key"]] += 1
    short = sum(there[key] < sum(counts.values()) for key, counts in plan.items())
    return {
        "stage": "generate",
        "prompts": len(plan),
        "responses": sum(there.values()),
        "failed": short,
        "models": {name: dict(counts) for name, counts in per_model.items()},
        "tokens": sum(counts["tokens"] for counts in per_model.values()),
        "cost": sum(counts["cost"] for counts in per_model.values()),
        "seconds": seconds,
        **({"start_digest": who[POLICY]["weights"]} if "weights" in who.get(POLICY, {}) else {}),
    }


def _show_plan(plan: Mapping[str, Mapping[str, int]], pool: Mapping[str, Model], first: Ask) -> None:
    counts: Counter[str] = Counter()
    for each in plan.values():
        counts.update(each)
    print(f"{len(plan):,} prompts, {sum(counts.values()):,} responses")
    for name in pool:
        print(f"  {name}: {counts[name]:,}")
    name = next(iter(plan[first.key]))
    print(f"first request, to {name}:\n{rendered(pool[name], Question(first.key, first.messages))}")
