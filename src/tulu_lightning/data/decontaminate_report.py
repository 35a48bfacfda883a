"""What decontamination found, as plain values, as text and as one HTML page."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from tulu_lightning.core import ngrams
from tulu_lightning.data.decontaminate import Findings, Scan, rows_to_drop, verdicts
from tulu_lightning.data.decontaminate_texts import turns_of

__all__ = ["as_html", "as_text", "report_of"]

AROUND = 60
"""Characters shown before and after what is shared."""


def report_of(scan: Scan, findings: Findings, worst: int = 5) -> dict[str, Any]:
    """One source against all sets, as plain values.

    Args:
        scan: the source.
        findings: of the scan.
        worst: pairs to show for each set: those with the largest shares, each item once.

    Returns:
        `source`, `rows`, `turns`, `dropped` (rows that the action would leave out) and, for each of `evaluations`, `name`,
        `items`, `hit`, `share`, `rows`, `contaminated` and `worst`: `row` and `item` (from 1), `share`, and both texts
        in `train` and `test`: `text`, and `shared`, the spans of characters that both have.
    """
    pairs, bounds = findings.pairs, scan.index.first_items
    told, found = [], verdicts(scan, findings)
    whole = scan.settings.action == "drop_source" and any(verdict.contaminated for verdict in found)
    for place, verdict in enumerate(found):
        mine = np.flatnonzero((pairs.items_P >= bounds[place]) & (pairs.items_P < bounds[place + 1]))
        mine = mine[np.lexsort((pairs.rows_P[mine], pairs.items_P[mine], -pairs.shares_P[mine]))]
        _, first = np.unique(pairs.items_P[mine], return_index=True)
        shown = mine[np.sort(first)][:worst]
        told.append(
            {
                "name": verdict.name,
                "items": verdict.items,
                "hit": verdict.hit,
                "share": verdict.share,
                "rows": verdict.rows,
                "contaminated": verdict.contaminated,
                "worst": [_pair(scan, *(column[at].item() for column in pairs)) for at in shown],
            }
        )
    return {
        "source": scan.source.name,
        "rows": len(scan.table),
        "turns": findings.turns,
        "dropped": len(scan.table) if whole else len(rows_to_drop(scan, findings)),
        "evaluations": told,
    }


def _pair(scan: Scan, row: int, item: int, share: float) -> dict[str, Any]:
    (read,) = scan.table.take([row])
    number = scan.table.number(row)
    train, test = turns_of(scan.source, number, read, scan.settings.turns), scan.index.item(item)
    return {
        "row": number,
        "item": scan.index.set_of(item)[1] + 1,
        "share": share,
        "train": _marked(scan, train, test),
        "test": _marked(scan, test, train),
    }


def _marked(scan: Scan, texts: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """Those of the texts that share something, each with the spans that it shares with the others."""
    split = [ngrams.tokens(other) for other in others]
    seen = ngrams.grams(split, scan.index.n)
    found = []
    for text in texts:
        words = ngrams.tokens(text)
        same = [words in split] * len(words)
        whole = scan.settings.mode == "exact" or len(words) < scan.index.n
        marks = same if whole else ngrams.matched(words, seen, scan.index.n)
        found.append({"text": text, "shared": _spans(text, marks)})
    return [each for each in found if each["shared"]] or found


def _spans(text: str, marks: Sequence[bool]) -> list[list[int]]:
    spans: list[list[int]] = []
    before = False
    for (start, end), mark in zip(ngrams.token_spans(text), marks, strict=True):
        if mark and before:
            spans[-1][1] = end
        elif mark:
            spans.append([start, end])
        before = mark
    return spans


# For people ---------------------------------------------------------------------------------------------------------

COLUMNS = ("source", "evaluation", "items", "hit", "share", "rows", "")


def as_text(reports: Sequence[dict[str, Any]]) -> str:
    """A table of (source, evaluation set), then the worst pairs, what they share between « and »."""
    lines = [list(COLUMNS), *_lines(reports)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    table = [
        "  ".join(
            text.ljust(width) if place < 2 or place == 6 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    pairs = [
        f"\n{title}\n  row   {_excerpt(pair['train'])}\n  item  {_excerpt(pair['test'])}"
        for title, pair in _pairs(reports)
    ]
    dropped = [
        f"{report['source']}: {report['dropped']:,} of {report['rows']:,} rows would be left out" for report in reports
    ]
    return "\n".join([*table, "", *dropped, *pairs])


def _lines(reports: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            report["source"],
            each["name"],
            f"{each['items']:,}",
            f"{each['hit']:,}",
            f"{each['share']:.1%}",
            f"{each['rows']:,}",
            "contaminated" if each["contaminated"] else "",
        ]
        for report in reports
        for each in report["evaluations"]
    ]


def _pairs(reports: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{report['source']}, row {pair['row']}; {each['name']}, item {pair['item']}: {pair['share']:.0%}", pair)
        for report in reports
        for each in report["evaluations"]
        for pair in each["worst"]
    ]


def _excerpt(texts: Sequence[dict[str, Any]]) -> str:
    return " / ".join(
        "".join(f"«{text}»" if shared else text for text, shared in _parts(each)) for each in texts
    ).replace("\n", " ")


def _parts(marked: dict[str, Any]) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is shared; far from what is shared it is cut."""
    text, parts, at = marked["text"], list[tuple[str, bool]](), 0
    for start, end in marked["shared"]:
        parts += [(_cut(text[at:start], bool(parts), True), False), (text[start:end], True)]
        at = end
    return [*parts, (_cut(text[at:], bool(parts), False), False)]


def _cut(text: str, after: bool, before: bool) -> str:
    """What stands after something shared, before something shared, or between two."""
    if len(text) <= AROUND * (1 + (after and before)) + 3:
        return text
    return (
        f"{text[:AROUND] if after else ''} … {text[-AROUND:] if before else ''}".strip(" ")
        if after or before
        else (f"{text[: 2 * AROUND]} …")
    )


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; text-align: left; vertical-align: top }
tr + tr { border-top: 1px solid #ddd } td.n { text-align: right } mark { background: #ffe08a } .bad { color: #a00; font-weight: 600 }
.pair td { width: 50%; white-space: pre-wrap; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem }
"""


def as_html(reports: Sequence[dict[str, Any]]) -> str:
    """The same as one page without scripts: pairs side by side, what they share marked."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if 2 <= place < 6 else "bad" if place == 6 else ""}">{html.escape(text)}</td>'
            for place, text in enumerate(line)
        )
        + "</tr>"
        for line in _lines(reports)
    )
    pairs = "".join(
        f'<h2>{html.escape(title)}</h2><table class="pair"><tr><th>training row</th><th>test item</th></tr>'
        f"<tr><td>{_html(pair['train'])}</td><td>{_html(pair['test'])}</td></tr></table>"
        for title, pair in _pairs(reports)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Decontamination</title><style>{STYLE}</style>'
        f"<h1>Decontamination</h1><table><tr>{head}</tr>{body}</table>{pairs}</html>\n"
    )


def _html(texts: Sequence[dict[str, Any]]) -> str:
    return "<hr>".join(
        "".join(f"<mark>{html.escape(text)}</mark>" if shared else html.escape(text) for text, shared in _parts(each))
        for each in texts
    )
