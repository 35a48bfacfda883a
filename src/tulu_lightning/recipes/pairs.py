"""On-policy preference pairs: sample from a checkpoint, judge with its verifier, pair right with wrong.

The paper's on-policy idea (Tülu 3, section 5.2) in its smallest form: the judge is a verifier. Token ids are written
beside the text and are what DPO trains on.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.callbacks.promote import peak_memory_bytes
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.prompt_formats import PromptRow
from tulu_lightning.data.prompts import PromptData, PromptSource
from tulu_lightning.data.rows import Mixed
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.pair_lengths import PairLengths, pair_lengths
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import score_all
from tulu_lightning.types import Completion, Prompt, Sampling, Verdict

__all__ = ["PairsConfig", "main", "make_pairs"]

CHUNK = 32
"""Prompts sampled between two writes: what a kill can cost."""


@dataclass(frozen=True)
class PairsConfig:
    """Sample responses from a checkpoint and pair right ones with wrong ones."""

    model: str
    """Model folder, or a known name."""
    output: str
    """Folder for samples.jsonl, pairs.jsonl and summary.json."""
    sources: list[PromptSource]
    """Prompts with `ground_truth` and what judges their answers."""
    samples_per_prompt: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    template: str = "chatml"
    max_tokens: int = 2048
    """Longest prompt, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


def main(argv: Sequence[str]) -> int:
    """`tulu pairs --config FILE`."""
    config, _ = read_config(PairsConfig, "tulu pairs", argv)
    make_pairs(config)
    return 0


def make_pairs(config: PairsConfig) -> dict[str, Any]:
    """Sample, judge, pair; goes on where a killed run stopped.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        InputError: bad prompts or model, the output holds samples of other settings, or no prompt got both a right
            and a wrong response.
    """
    output = Path(config.output)
    data = _PromptsAsWritten(
        sources=config.sources,
        tokenizer=config.model,
        max_tokens=config.max_tokens,
        examples_per_step=1,
        template=config.template,
    )
    data.setup()
    digest = _claim(output, config)
    started = time.perf_counter()
    samples = _sample(config, data, output / "samples.jsonl")
    rows = list(_pairs(samples, data.prompts, data.messages, config.seed))
    lengths = pair_lengths((len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    if lengths is None:
        raise InputError(
            str(output), "no prompt got both a right and a wrong response", "Use other prompts, or more samples."
        )
    write_whole(output / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    counts = {"prompts": len(data.prompts), "samples": sum(map(len, samples.values())), "pairs": len(rows)}
    tokens = sum(len(sample["ids"]) for group in samples.values() for sample in group)
    right = sum(sample["right"] for group in samples.values() for sample in group)
    summary = {
        "stage": "pairs",
        **counts,
        "right_share": right / counts["samples"],
        "lengths": lengths._asdict(),
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "model": str(resolve_model(config.model)),
        "start_digest": digest,
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=1))
    print(f"{counts['pairs']} pairs of {counts['prompts']} prompts: {output / 'pairs.jsonl'}")
    print(f"mean tokens: chosen {lengths.chosen:.1f}, rejected {lengths.rejected:.1f}; {_longer(lengths)}", flush=True)
    return summary


def _longer(lengths: PairLengths) -> str:
    return f"chosen is longer in {lengths.chosen_longer:.0%} of the pairs, rejected in {lengths.rejected_longer:.0%}"


class _PromptsAsWritten(PromptData):
    """Keeps the messages of each prompt: `messages[prompt.row]`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.messages: list[Any] = []
        self._kept: dict[str, list[Any]] = {source.name: [] for source in self.sources}

    def _prompt(self, source: Source, number: int, row: PromptRow, ids: list[int]) -> Prompt | LeftOut:
        outcome = super()._prompt(source, number, row, ids)
        if isinstance(outcome, Prompt):
            self._kept[source.name].append(row.messages)
        return outcome

    def _collect(self, mixed: Mixed) -> list[Prompt]:
        names = [part.name for part in mixed.sources]
        self.messages = [
            self._kept[names[source]][place] for source, place in zip(mixed.source_numbers, mixed.places, strict=True)
        ]
        return super()._collect(mixed)


def _claim(output: Path, config: PairsConfig) -> str:
    """Refuse a folder whose samples came from other settings; they would be mixed without a word.

    Returns:
        Digest of the weights: `promoted` is one path for whatever was promoted last.
    """
    folder = resolve_model(config.model)
    model = {"model": str(folder), "weights": weights_digest(folder)}
    settings = json.dumps({**asdict(config), **model}, indent=1, default=str)
    path = output / "settings.json"
    if path.exists() and path.read_text() != settings:
        raise InputError(str(output), "holds samples made with other settings", "Give another output, or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, settings)
    return model["weights"]


def _sample(config: PairsConfig, data: PromptData, path: Path) -> dict[int, list[dict[str, Any]]]:
    """All samples by row, from the file as far as it goes, then from the engine."""
    samples = _read(path, config.samples_per_prompt)
    missing = [prompt for prompt in data.prompts if prompt.row not in samples]
    if not missing:
        return samples
    engine = LocalEngine.from_folder(resolve_model(config.model), getattr(torch, config.dtype))
    sampling = Sampling(config.max_new_tokens, config.temperature, data.stop_ids)
    seed = mix_seed(config.seed, 0)
    with Progress("pairs", len(data.prompts), done=len(samples)) as progress, path.open("a") as file:
        for at in range(0, len(missing), CHUNK):
            part = missing[at : at + CHUNK]
            made = engine.generate(
                [p.ids for p in part], config.samples_per_prompt, sampling, seed, keys=[p.row for p in part]
            )
            for prompt, completions in zip(part, made, strict=True):
                verdicts = score_all([(prompt, c) for c in completions], data.tokenizer)
                samples[prompt.row] = [_record(c, v, data) for c, v in zip(completions, verdicts, strict=True)]
                file.write(json.dumps({"row": prompt.row, "samples": samples[prompt.row]}) + "\n")
            file.flush()
            progress.update(len(samples))
    engine.close()
    return samples


def _record(completion: Completion, verdict: Verdict, data: PromptData) -> dict[str, Any]:
    ids = completion.ids_L.tolist()
    return {
        "ids": ids,
        "text": data.tokenizer.decode(ids, skip_special_tokens=True),
        "outcome": verdict.outcome,
        "finish": completion.finish,
        "right": verdict.outcome == "right" and completion.finish == "stop",
    }


def _read(path: Path, expected: int) -> dict[int, list[dict[str, Any]]]:
    samples: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if len(record["samples"]) == expected:
            samples[record["row"]] = record["samples"]
    if path.exists():  # drop a torn line, or the next record would be glued to it
        write_whole(path, "".join(json.dumps({"row": row, "samples": group}) + "\n" for row, group in samples.items()))
    return samples


def _pairs(
    samples: dict[int, list[dict[str, Any]]], prompts: Sequence[Prompt], messages: Sequence[Any], seed: int
) -> Iterator[dict[str, Any]]:
    """One pair for each prompt that got both: a right answer that stopped, and one that is wrong or did not stop."""
    for prompt in prompts:
        group = samples[prompt.row]
        right = [s for s in group if s["right"]]
        wrong = [s for s in group if not s["right"]]
        if not right or not wrong:
            continue
        draw = random.Random(mix_seed(seed, 1, prompt.row))
        chosen, rejected = draw.choice(right), draw.choice(wrong)
        yield {
            "prompt": messages[prompt.row],
            "chosen": chosen["text"],
            "rejected": rejected["text"],
            "prompt_ids": list(prompt.ids),
            "chosen_ids": chosen["ids"],
            "rejected_ids": rejected["ids"],
        }
