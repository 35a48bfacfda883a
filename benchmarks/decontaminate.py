"""Rows a second of decontamination, from 10,000 rows to a million, against twenty evaluation sets; and the memory it takes.

    python benchmarks/decontaminate.py --rows 10000 100000 1000000 --processes 2

Rows of about 300 tokens in a Parquet file: two of 5,000 texts each, put together anew for each row, of words drawn as often as
Zipf's law has it, so that rows share common words and runs. Every 500th row quotes a test item. The sets have 2,500 items
of 20 to 180 tokens. Time is that of reading, comparing and collecting, with the index built before and an empty cache
of findings; the processes start anew for each number of rows. Prints one JSON line for each number of rows; peak memory is
that of all processes together, this one's texts included. Pages of mapped files are the system's to drop.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SETS, ITEMS, POOL, WORDS = 20, 2500, 5000, 100_000


def texts(draw: np.random.Generator, words: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Texts of these lengths."""
    ranks = np.minimum(draw.zipf(1.2, int(lengths.sum())) - 1, len(words) - 1)
    ends = np.cumsum(lengths)
    return [" ".join(words[ranks[end - length : end]]) for end, length in zip(ends, lengths, strict=True)]


def write(path: Path, count: int, first: list[str], second: list[str], items: list[str]) -> None:
    """The training rows."""
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(turn))])
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, count, 20_000):
            rows = []
            for row in range(start, min(start + 20_000, count)):
                text = f"{first[row % POOL]} {second[row * 7 % (POOL - 1)]}"
                text = f"{text} {items[row // 500 % len(items)]}" if row % 500 == 0 else text
                rows.append([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}])
            file.write_table(pa.table({"messages": rows}, schema=schema))


def main() -> None:
    """Measure."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["TULU_CACHE"], os.environ["HF_DATASETS_CACHE"] = str(folder / "cache"), str(folder / "datasets")
        measure(folder, chosen.rows, chosen.processes)


def processor_seconds() -> float:
    """Of this process and of its children that have ended: another job on the machine disturbs it less than the clock."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Memory(threading.Thread):
    """The most that this process and its children had at once, in GB: of their own, and with mapped files, each page once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own, self.all, self._done = 0.0, 0.0, threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self._done.wait(0.5):
            found = [self._of(pid) for pid in (os.getpid(), *self._children())]
            self.own = max(self.own, sum(own for own, _ in found))
            self.all = max(self.all, sum(everything for _, everything in found))

    def stop(self) -> None:
        """End."""
        self._done.set()
        self.join()

    def _children(self) -> list[int]:
        tasks = Path(f"/proc/{os.getpid()}/task")
        return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    def _of(self, pid: int) -> tuple[float, float]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0.0, 0.0
        sizes = {name: int(rest.split()[0]) / 2**20 for name, _, rest in (line.partition(":") for line in lines[1:])}
        return sizes["Pss_Anon"], sizes["Pss"]


def measure(folder: Path, counts: list[int], processes: int) -> None:
    """One line for each number of rows."""
    from tulu_lightning.data.decontaminate import verdicts
    from tulu_lightning.data.decontaminate_scan import evaluation_index, find, open_scan
    from tulu_lightning.data.decontaminate_settings import Decontaminate, Evaluation
    from tulu_lightning.data.sources import Source, open_source

    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = np.array(["".join(draw.choice(letters, size)) for size in draw.integers(2, 9, WORDS)], dtype=object)
    tests = [texts(draw, words, draw.integers(20, 180, ITEMS)) for _ in range(SETS)]
    sets = []
    for number, items in enumerate(tests):
        path = folder / f"set{number}.jsonl"
        path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
        sets.append(Evaluation(f"set{number}", path=str(path), fields=["question"]))
    settings = Decontaminate(sets)
    start = time.perf_counter()
    index = evaluation_index(settings)
    built = time.perf_counter() - start
    first, second = (texts(draw, words, draw.integers(100, 200, POOL)) for _ in range(2))
    for count in counts:
        path = folder / f"rows{count}.parquet"
        write(path, count, first, second, [item for items in tests for item in items])
        source = Source("rows", path=str(path))
        start, used, memory = time.perf_counter(), processor_seconds(), Memory()
        memory.start()
        scan = open_scan(source, open_source(source), index, settings)
        opened = time.perf_counter() - start
        findings = find(scan, processes)
        seconds = time.perf_counter() - start
        assert findings is not None
        memory.stop()
        print(
            json.dumps(
                {
                    "rows": count,
                    "seconds": round(seconds, 1),
                    "of them opening the file": round(opened, 1),
                    "processor_seconds": round(processor_seconds() - used, 1),
                    "rows_per_second": round(count / seconds),
                    "items_hit": sum(verdict.hit for verdict in verdicts(scan, findings)),
                    "items_quoted": len({row // 500 % (SETS * ITEMS) for row in range(0, count, 500)}),
                    "peak_gb": round(memory.own, 2),
                    "peak_gb with mapped files": round(memory.all, 2),
                    "ngrams": len(index.hashes),
                    "index_seconds": round(built, 1),
                    "processes": processes,
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                }
            ),
            flush=True,
        )
        path.unlink()


if __name__ == "__main__":
    main()
