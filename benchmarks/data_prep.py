"""Rows a second of preparing SFT data: ours (tokenise, mask, store, plan the packs) against TRL's SFTTrainer.

    python benchmarks/data_prep.py --rows 10000 --repeats 3

The rows are `alpaca_en_demo`, repeated and numbered so that no two are alike, in a JSON-lines file; the tokenizer is
SmolLM2's. Both sides load the tokenizer, read the file, and end with packs of at most 2048 tokens. TRL (`datasets.map`
with the chat template, labels, best-fit packing) works once in this process and once with a process for each core; the
better of the two counts. Ours starts with an empty cache, and plans every micro-batch of an epoch. The sides take turns. Prints one JSON line: medians of rows a second, their
ratio pair by pair, rows by second of processor time (all threads and processes), which another job on the machine
disturbs less, and the seconds of a start that finds its tokens in the cache.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, TINY = "smollm2-135m-instruct", "tiny-random-llama"
LENGTH = 2048
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""ChatML with TRL's marks for what is trained; the ids are those of our `chatml`."""


def chat_rows(count: int) -> list[dict[str, Any]]:
    """So many different chat rows."""
    from tulu_lightning.assets.rows import alpaca_rows

    known = alpaca_rows(999, max_chars=10**9)
    rows = []
    for number in range(count):
        question, answer = known[number % len(known)]["messages"]
        asked = {"role": "user", "content": f"({number}) {question['content']}"}
        rows.append({"messages": [asked, {"role": "assistant", "content": f"{answer['content']} ({number})"}]})
    return rows


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def ours(path: Path) -> dict[str, float]:
    """Seconds from the file to the plan of an epoch's packs, and what came out."""
    from tulu_lightning.data.sft import SFTData
    from tulu_lightning.data.sources import Source

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TULU_TOKENS"] = cache
        found: dict[str, float] = {}
        for when in ("", "again "):
            start, used = time.perf_counter(), processor_seconds()
            data = SFTData(
                sources=[Source("alpaca", path=str(path))],
                tokenizer=MODEL,
                max_tokens=LENGTH,
                micro_tokens=LENGTH,
                examples_per_step=128,
            )
            data.setup()
            plan = data._plan(1)
            packs = sum(len(plan.micro_batches(step)) for step in range(plan.total_steps))
            found |= {f"{when}seconds": time.perf_counter() - start, f"{when}used": processor_seconds() - used}
        totals = data.manifest()["totals"]
    return {**found, "packs": packs, "tokens": totals["tokens"], "trained": totals["trained_tokens"]}


def theirs(path: Path, processes: int | None) -> dict[str, float]:
    """Seconds of loading and of TRL's preparation inside the constructor of an SFTTrainer, and what came out."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tulu_lightning.assets.models import resolve_model

    datasets.disable_caching()
    taken: list[tuple[float, float]] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start, used = time.perf_counter(), processor_seconds()
            prepared = super()._prepare_dataset(*args, **kwargs)
            taken.append((time.perf_counter() - start, processor_seconds() - used))
            return prepared

    with tempfile.TemporaryDirectory() as folder:
        start, used = time.perf_counter(), processor_seconds()
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
        tokenizer.chat_template = TEMPLATE
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
        taken.append((time.perf_counter() - start, processor_seconds() - used))
        config = SFTConfig(
            output_dir=folder, max_length=LENGTH, packing=True, assistant_only_loss=True, dataset_num_proc=processes,
            report_to=[], use_cpu=True, disable_tqdm=True, eos_token="<|im_end|>",
        )  # fmt: skip
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(resolve_model(TINY)),  # unused: only the rows are prepared
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        prepared: Any = trainer.train_dataset
        tokens = sum(map(len, prepared["input_ids"]))
        trained = sum(label != -100 for labels in prepared["labels"] for label in labels)
    seconds, used = map(sum, zip(*taken, strict=True))
    return {"seconds": seconds, "used": used, "packs": len(prepared), "tokens": tokens, "trained": trained}


def measure(count: int = 10_000, repeats: int = 3) -> dict[str, Any]:
    """Both sides in turn.

    Args:
        count: rows.
        repeats: pairs.

    Raises:
        RuntimeError: the sides do not agree on the trained tokens.
    """
    cores = len(os.sched_getaffinity(0))
    rows = chat_rows(count)
    settings: dict[str, int | None] = {"one process": None, f"{cores} processes": cores}
    runs: dict[str, list[dict[str, float]]] = {"ours": [], **{name: [] for name in settings}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        few = Path(folder, "few.jsonl")
        few.write_text("".join(json.dumps(row) + "\n" for row in rows[:50]), encoding="utf-8")
        with contextlib.redirect_stderr(io.StringIO()):  # imports are in nobody's time
            ours(few)
            theirs(few, None)
        for _ in range(repeats):
            with contextlib.redirect_stderr(io.StringIO()):
                runs["ours"].append(ours(path))
                for name, processes in settings.items():
                    runs[name].append(theirs(path, processes))
    trained = {name: run[0]["trained"] for name, run in runs.items()}
    if len(set(trained.values())) > 1:
        raise RuntimeError(f"the sides do not train the same tokens: {trained}")
    rates = {name: [count / run["seconds"] for run in found] for name, found in runs.items()}
    best = max(settings, key=lambda name: statistics.median(rates[name]))
    pairs = [a / b for a, b in zip(rates["ours"], rates[best], strict=True)]
    return {
        "rows": count,
        "tokens": runs["ours"][0]["tokens"],
        "trained_tokens": trained["ours"],
        "rows_per_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "rows_per_processor_second": {
            name: round(statistics.median(count / run["used"] for run in found), 1) for name, found in runs.items()
        },
        "seconds_of_a_start_from_the_cache": round(statistics.median(run["again seconds"] for run in runs["ours"]), 2),
        "packs": {name: run[0]["packs"] for name, run in runs.items()},
        "best_of_trl": best,
        "ratio": round(statistics.median(pairs), 2),
        "pairs": [round(pair, 2) for pair in pairs],
        "cores": cores,
        "machine": platform.processor() or platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.rows, options.repeats)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
