"""Row lengths by source: figures, a histogram in text, and one as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tulu_lightning.errors import InputError

__all__ = ["Histogram", "Summary", "histogram", "histogram_text", "summaries", "write_png"]

BARS = " ▏▎▍▌▋▊▉█"
WIDTH = 40


class Summary(NamedTuple):
    """What is said of one source's row lengths, in tokens."""

    rows: int
    mean: float
    median: float
    p95: float
    longest: int
    total: int


class Histogram(NamedTuple):
    """Counts of rows between neighbouring edges (tokens); one series a source."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


def summaries(lengths: Mapping[str, np.ndarray]) -> dict[str, Summary]:
    """Figures of each source that has rows."""
    return {
        name: Summary(
            int(tokens.size),
            float(tokens.mean()),
            float(np.median(tokens)),
            float(np.percentile(tokens, 95)),
            int(tokens.max()),
            int(tokens.sum()),
        )
        for name, tokens in lengths.items()
        if tokens.size
    }


def histogram(lengths: Mapping[str, np.ndarray], bins: int = 16) -> Histogram:
    """Rows by length, the same geometric bins for every source: lengths of chats spread over decades.

    Args:
        lengths: tokens of each row, by source; sources without rows are left out.
        bins: number of bins.

    Raises:
        InputError: fewer than one bin, or no row at all.
    """
    if bins < 1:
        raise InputError("--bins", f"is {bins}", "Use at least 1.")
    present = {name: np.asarray(tokens) for name, tokens in lengths.items() if len(tokens)}
    if not present:
        raise InputError("data", "there is no row to count", "Give a source with rows.")
    low = min(int(tokens.min()) for tokens in present.values())
    high = max(int(tokens.max()) for tokens in present.values())
    # Whole numbers, each bin at least one wide; the last edge is past the longest row.
    edges = np.unique(np.rint(np.geomspace(max(1, low), high + 1, bins + 1)))
    if edges.size < 2:
        edges = np.array([edges[0], edges[0] + 1])
    counts = {name: np.histogram(tokens, edges)[0] for name, tokens in present.items()}
    return Histogram(tuple(edges.tolist()), {name: tuple(map(int, count)) for name, count in counts.items()})


def histogram_text(found: Histogram) -> str:
    """The histogram as bars of block characters, one panel a source, all on the source's own scale."""
    labels = [f"{low:.0f}–{high - 1:.0f}" for low, high in zip(found.edges, found.edges[1:], strict=False)]
    width = max(map(len, labels))
    panels = []
    for name, counts in found.counts.items():
        top = max(counts)
        lines = [
            f"  {label:>{width}}  {_bar(count / top)} {count}" for label, count in zip(labels, counts, strict=True)
        ]
        panels.append("\n".join([f"{name}: rows by tokens", *lines]))
    return "\n\n".join(panels)


def _bar(share: float) -> str:
    eighths = round(share * WIDTH * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + (BARS[eighths % 8] if eighths % 8 else "")


def write_png(found: Histogram, path: str | Path) -> Path:
    """The histogram as a PNG, one panel a source, with a logarithmic axis of tokens.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "Install it with pip install 'tulu-lightning[demo]', or leave --png out."
        raise InputError("--png", "matplotlib is not installed", remedy) from error
    rows = len(found.counts)
    figure = Figure(figsize=(7, 0.6 + 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    widths = np.diff(found.edges)
    for axis, (name, counts) in zip(axes, found.counts.items(), strict=True):
        axis.bar(
            found.edges[:-1], counts, width=widths, align="edge", color="#3b6ea5", edgecolor="white", linewidth=0.6
        )
        axis.set_xscale("log")
        axis.set_title(f"{name} ({sum(counts):,} rows)", loc="left", fontsize=9)
        axis.set_ylabel("rows", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    ticks = [edge for edge in found.edges if edge >= 1][:: max(1, len(found.edges) // 8)]
    axes[-1].set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("tokens of a row", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"the picture cannot be written ({error})", "Give a writable .png path.") from error
    return Path(path)
