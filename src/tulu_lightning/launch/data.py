"""`tulu data inspect`, `stats` and `decontaminate`: what the model will see, from a stage's config, without a model."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from tulu_lightning.core.packing import scored_tokens
from tulu_lightning.data import lengths
from tulu_lightning.data.base import StepData
from tulu_lightning.data.inspect import shown
from tulu_lightning.data.manifest import manifest_table
from tulu_lightning.data.packed import PackedData
from tulu_lightning.data.pairs import side_lengths
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.launch.fit import TuluCLI
from tulu_lightning.launch.parser import in_own_words
from tulu_lightning.launch.quiet import without_noise
from tulu_lightning.types import Document, Prompt, Segment

__all__ = ["load_data", "main"]

USAGE = """\
usage: tulu data inspect --config FILE [--rows N | --row K] [--source NAME] [--ids] [--colour auto|always|never]
       tulu data stats   --config FILE [--bins N] [--png FILE]
       tulu data decontaminate --config FILE --against FILE [--out FOLDER] [--action report|drop_rows|drop_source]

inspect  rows as the model sees them, trained tokens marked; the template's checks; the mixture as a table
stats    lengths of the rows by source, in figures and as a histogram, of pairs also those of both sides; with --png
         also as a picture
decontaminate  rows that repeat items of evaluation sets: a report, and the rows without them (--help for more)

FILE is the config of a stage, and options such as --data.max_tokens=512 change it as in `tulu fit`.
"""


class _DataOnly(TuluCLI):
    """Parses a stage's config in full and builds its data module; no run folder, no model."""

    def before_instantiate_classes(self) -> None:
        """There is no run folder to settle."""

    def instantiate_classes(self) -> None:
        """Build the data module alone."""
        settings = self._get(self.config, "data")
        if settings is None:
            raise InputError("data", "the config has none", "Give data with a class_path, as a stage's config does.")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(pl.LightningDataModule, "data")
        with in_own_words():
            built: Any = parser.instantiate_classes(parser.parse_object({"data": settings.as_dict()}))
        self.datamodule = built.data

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def load_data(argv: Sequence[str]) -> StepData:
    """The data module of a stage's config, set up.

    Args:
        argv: as for `tulu fit`: `--config FILE` and options.

    Raises:
        InputError: the config or its data are bad, or the data module is none of this package.
    """
    data: Any = _DataOnly(["fit", *argv]).datamodule
    if not isinstance(data, StepData):
        what = f"is {type(data).__name__}"
        raise InputError("data.class_path", what, "Inspect one of SFTData, PreferenceData and PromptData.")
    data.setup()
    return data


def main(argv: Sequence[str]) -> int:
    """Run `tulu data inspect`, `tulu data stats` or `tulu data decontaminate`.

    Raises:
        InputError: there is no such action, or its options, the config or the data are bad.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    actions = {"inspect": _inspect, "stats": _stats, "decontaminate": _decontaminate}
    if argv[0] not in actions:
        raise InputError("tulu data", f"no such action: {argv[0]!r}", nearest(argv[0], actions))
    if any(option in ("-h", "--help") for option in argv[1:]):
        print(_more(argv[0]), end="")
        return 0
    with without_noise():
        actions[argv[0]](argv[1:])
    return 0


def _decontaminate(argv: Sequence[str]) -> None:
    from tulu_lightning.launch import decontaminate  # which builds on this file

    decontaminate.run(argv)


def _more(action: str) -> str:
    from tulu_lightning.launch import decontaminate

    return decontaminate.USAGE if action == "decontaminate" else USAGE


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError("command line", message, "`tulu data --help` shows the options.")


def _inspect(argv: Sequence[str]) -> None:
    options = _Options(add_help=False, allow_abbrev=False)
    options.add_argument("--rows", type=int)
    options.add_argument("--row", type=int)
    options.add_argument("--source")
    options.add_argument("--ids", action="store_true")
    options.add_argument("--colour", "--color", choices=("auto", "always", "never"), default="auto")
    chosen, rest = options.parse_known_args(argv)
    if chosen.row is not None and (chosen.rows is not None or chosen.source is not None):
        raise InputError("--row", "shows one row, and --rows and --source choose others", "Give one or the others.")
    chosen.rows = 3 if chosen.rows is None else chosen.rows
    if chosen.rows < 1:
        raise InputError("--rows", f"is {chosen.rows}", "Use at least 1.")
    data = load_data(rest)
    console = _console(chosen.colour)
    for row in _rows(data, chosen):
        _print_row(console, data, row, chosen.ids)
    console.rule()
    console.print(Text(data.checkup), soft_wrap=True)
    console.print()
    console.print(Text(manifest_table(data.manifest())), soft_wrap=True)


def _console(colour: str) -> Console:
    forced = {"auto": None, "always": True, "never": False}[colour]
    return Console(file=sys.stdout, force_terminal=forced, no_color=colour == "never", highlight=False)


def _rows(data: StepData, chosen: argparse.Namespace) -> list[int]:
    """The row asked for; or the first rows of the first steps, in the order in which training meets them."""
    total = len(data.mixed)
    if chosen.row is not None:
        if not 0 <= chosen.row < total:
            raise InputError("--row", f"is {chosen.row}", f"Rows are numbered 0 to {total - 1}.")
        return [chosen.row]
    if chosen.source is not None and chosen.source not in data.source_names:
        raise InputError("--source", f"there is no source {chosen.source!r}", nearest(chosen.source, data.source_names))
    found: list[int] = []
    plan = data._plan(1)
    for step in range(min(plan.steps_per_epoch, plan.total_steps)):
        found += [row for row in plan.examples(step) if chosen.source in (None, data.source_of(row))]
        if len(found) >= chosen.rows:
            return found[: chosen.rows]
    # Fewer than asked for are trained on: the rest are rows that the run does not reach.
    wanted = range(total) if chosen.source is None else np.flatnonzero(_of_source(data, chosen.source)).tolist()
    met = set(found)
    return [*found, *(row for row in wanted if row not in met)][: chosen.rows]


def _of_source(data: StepData, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return data.source_numbers == data.source_names.index(name)


def _print_row(console: Console, data: StepData, row: int, ids: bool) -> None:
    item = data.mixed[row]
    document = _as_document(item) if isinstance(item, Prompt) else item
    tokens = sum(segment.ids_L.numel() for segment in document.segments)
    trained = scored_tokens(document)
    head = f"row {row}, source {data.source_of(row)!r}: {tokens} tokens"
    if isinstance(data, PreferenceData):
        start, *rests = (segment.ids_L.numel() for segment in document.segments)
        head += f" (chosen {start + rests[0]}, rejected {start + rests[1]})"
    head += f", {trained} trained" if isinstance(data, PackedData) else ""
    console.rule(Text(head), align="left")
    text = shown(data.tokenizer, document, ids, colour=console.is_terminal and not console.no_color)
    console.print(text, soft_wrap=True)  # else lines would end where the row has no line end
    for check in item.checks if isinstance(item, Prompt) else ():
        weight = "" if check.weight == 1 else f", weight {check.weight:g}"
        console.print(Text(f"judged by {check.verifier}{weight}: {check.target}"), soft_wrap=True)


def _as_document(prompt: Prompt) -> Document:
    ids = torch.tensor(prompt.ids)
    return Document((Segment(ids, torch.zeros(ids.numel())),))


def _stats(argv: Sequence[str]) -> None:
    options = _Options(add_help=False, allow_abbrev=False)
    options.add_argument("--bins", type=int, default=16)
    options.add_argument("--png")
    chosen, rest = options.parse_known_args(argv)
    if chosen.png is not None and not chosen.png.endswith(".png"):
        raise InputError("--png", f"is {chosen.png!r}", "Give a file name that ends with .png.")
    data = load_data(rest)
    tokens = data.mixed.lengths
    numbers = data.source_numbers
    by_source = {name: tokens[numbers == index] for index, name in enumerate(data.source_names)}
    if len(by_source) > 1:
        by_source["all sources"] = tokens
    found = lengths.histogram(by_source, chosen.bins)
    print(_figures("tokens of a row, template included", lengths.summaries(by_source)), end="\n\n")
    if isinstance(data, PreferenceData):
        print(_sides(data), end="\n\n")
    print(lengths.histogram_text(found))
    if chosen.png is not None:
        print(f"\npicture: {lengths.write_png(found, chosen.png)}")


def _sides(data: PreferenceData) -> str:
    """Both sides of the pairs by source: all their tokens, their scored ones, and how often the chosen one is longer."""
    tokens_R2, scored_R2 = side_lengths(data.documents)
    of_source = {name: data.source_numbers == index for index, name in enumerate(data.source_names)}
    tables = []
    for title, values_R2 in (("tokens of a side, prompt included", tokens_R2), ("scored tokens of a side", scored_R2)):
        by_side = {
            f"{name}, {side}": values_R2[rows, column]
            for name, rows in of_source.items()
            for column, side in enumerate(("chosen", "rejected"))
        }
        tables.append(_figures(title, lengths.summaries(by_side)))
    longer = {name: (scored_R2[rows, 0] > scored_R2[rows, 1]).mean() for name, rows in of_source.items()}
    lines = [
        f"{name}: the chosen side has more scored tokens in {share:.0%} of pairs" for name, share in longer.items()
    ]
    return "\n\n".join([*tables, "\n".join(lines)])


def _figures(title: str, summaries: dict[str, lengths.Summary]) -> str:
    head = ("source", "rows", "mean", "median", "95%", "longest", "tokens")
    rows = [
        (name, f"{s.rows:,}", f"{s.mean:.1f}", f"{s.median:.0f}", f"{s.p95:.0f}", f"{s.longest:,}", f"{s.total:,}")
        for name, s in summaries.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for cells in (head, *rows):
        name, *figures = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append("  ".join([name, *figures]))
    return "\n".join([title, *lines])
