"""Conversations rendered, tokenised and masked a second: ours beside transformers' `apply_chat_template` row by row.

    python benchmarks/chat.py --model smollm2-135m-instruct --template chatml --rounds 5

Runs both in turn on the same rows (`alpaca_en_demo`, all within `--max-chars`) and prints one JSON line: rows a second
of each round's fastest, and the ratio round by round. The first round of ours fills its table of words; it is given
apart.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.assets.rows import alpaca_rows
from tulu_lightning.data.chat import chat_template, encode_many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder or name whose tokenizer is used")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--rows", type=int, default=990)
    parser.add_argument("--max-chars", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    template = chat_template(options.template, tokenizer)
    rows = [row["messages"] for row in alpaca_rows(options.rows, max_chars=options.max_chars)]

    def theirs() -> list[list[int]]:
        arguments: dict[str, Any] = {"chat_template": template.jinja, "tokenize": True, "return_dict": True}
        return [tokenizer.apply_chat_template(row, **arguments)["input_ids"] for row in rows]  # type: ignore[call-overload, index]

    def ours() -> list[list[int]]:
        return [row.ids for row in encode_many(tokenizer, template, rows)]

    first, found = timed(ours)
    same = sum(mine == other for mine, other in zip(found, theirs(), strict=True))
    pairs = [(timed(ours)[0], timed(theirs)[0]) for _ in range(options.rounds)]
    record = {
        "what": "chat",
        "model": options.model,
        "template": options.template,
        "rows": len(rows),
        "rows_with_equal_ids": same,
        "rows_per_s": round(len(rows) / min(mine for mine, _ in pairs)),
        "rows_per_s_first_call": round(len(rows) / first),
        "rows_per_s_transformers": round(len(rows) / min(other for _, other in pairs)),
        "ratios": [round(other / mine, 2) for mine, other in pairs],
        "median_ratio": round(statistics.median(other / mine for mine, other in pairs), 2),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(record))


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


if __name__ == "__main__":
    main()
