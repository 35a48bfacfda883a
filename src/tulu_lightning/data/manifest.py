"""What a run was trained on, written down: rows, tokens and losses of every source, and hashes of all of it."""

from collections.abc import Mapping
from typing import Any

from tulu_lightning.data.rows import Mixed

__all__ = ["manifest_of", "manifest_table"]

NUMBERS = ("rows", "tried", "kept", "truncated", "repeated", "used", "tokens", "trained_tokens")
"""The numbers of a source, in the order of the table."""

REPEATING = "repeating an evaluation set"


def manifest_of(mixed: Mixed, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a mixture, as plain values.

    Of each source: `rows` that it has, rows `tried` (all of them, or those that were drawn, and those that
    decontamination took out), `kept`, `left_out` by reason, `truncated` (kept, but cut), `repeated` (added by up-sampling) and `used` (kept and repeated: the rows of an
    epoch); `tokens` and `trained_tokens` of the used rows; `digest` of what is trained on, `fingerprint` of what was
    read.

    Args:
        mixed: the rows.
        settings: what else decides them.
    """
    sources: dict[str, dict[str, Any]] = {}
    for part, pick in zip(mixed.sources, mixed.picks, strict=True):
        counts = part.counts
        before = {REPEATING: part.repeating} if part.repeating else {}
        sources[part.name] = {
            "rows": counts.rows + part.repeating,
            "tried": counts.tried + part.repeating,
            "kept": counts.kept,
            "left_out": before | dict(sorted(counts.left_out.items())),
            "truncated": counts.truncated,
            "repeated": len(pick) - counts.kept,
            "used": len(pick),
            "tokens": int(part.lengths[pick].sum()),
            "trained_tokens": int(part.trained[pick].sum()),
            "digest": part.digest,
            "fingerprint": part.fingerprint,
        }
    totals = {name: sum(source[name] for source in sources.values()) for name in NUMBERS}
    totals["left_out"] = sum(sum(source["left_out"].values()) for source in sources.values())
    return {"digest": mixed.digest(), "settings": dict(settings), "totals": totals, "sources": sources}


def manifest_table(manifest: Mapping[str, Any]) -> str:
    """A manifest as a table for people: one line a source, the training rows' totals, then why rows were left out."""
    columns = ("rows", "tried", "kept", "left_out", "truncated", "repeated", "used", "tokens", "trained_tokens")
    shown = dict(manifest["sources"])
    if "validation" in manifest:
        shown |= {f"{name} (validation)": source for name, source in manifest["validation"]["sources"].items()}
    body = [
        [name, *_numbers({**source, "left_out": sum(source["left_out"].values())}, columns)]
        for name, source in shown.items()
    ]
    lines = [
        ["source", *(name.replace("_", " ") for name in columns)],
        *body,
        ["all", *_numbers(manifest["totals"], columns)],
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
    table = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    reasons = [
        f"{name}: left out {', '.join(f'{count:,} {reason}' for reason, count in source['left_out'].items())}"
        for name, source in manifest["sources"].items()
        if source["left_out"]
    ]
    settings = ", ".join(f"{name} {value}" for name, value in manifest["settings"].items())
    return "\n".join([*table, *reasons, f"content {manifest['digest'][:16]}, {settings}"])


def _numbers(values: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [f"{values[name]:,}" for name in columns]
