"""Pieces of HTML that several sections of the report are made of."""

import html
from collections.abc import Sequence

from tulu_lightning.recipes.table import Cell

__all__ = ["cell_table", "escape", "facts_table"]


def escape(value: object) -> str:
    """Text that a file or a model wrote, for between tags and for attributes."""
    return html.escape(str(value))


def cell_table(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], left: Sequence[str] = (), best: Sequence[int] = ()
) -> str:
    """A table in a card; on a phone each row becomes a block, its cells one under the other with their headings.

    Args:
        headings: of the columns; the first names the rows.
        rows: as many cells each.
        left: headings of columns that hold words and not figures.
        best: per row the column that is printed in bold, 0 for none; empty for no bold at all.
    """
    head = "".join(f'<th scope="col"{_side(i, h, left)}>{escape(h)}</th>' for i, h in enumerate(headings))
    body = []
    for at, cells in enumerate(rows):
        bold = best[at] if best else 0
        out = [f'<th scope="row">{_content(cells[0])}</th>']
        for i, (heading, cell) in enumerate(zip(headings[1:], cells[1:], strict=True), 1):
            strong = _content(cell, "b" if i == bold else "")
            out.append(f'<td data-label="{escape(heading)}"{_side(i, heading, left)}><span>{strong}</span></td>')
        body.append(f"<tr>{''.join(out)}</tr>")
    return (
        f'<div class="card"><table class="scores"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _side(place: int, heading: str, left: Sequence[str]) -> str:
    return "" if place == 0 or heading in left else ' class="n"'


def _content(cell: Cell, tag: str = "") -> str:
    detail = f'<span class="detail">{escape(cell.detail)}</span>' if cell.detail else ""
    words = escape(cell.text)
    return (f"<{tag}>{words}</{tag}>" if tag else words) + detail


def facts_table(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """Names and values in a card; empty where there are none. The values are HTML already."""
    if not facts:
        return ""
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{value}</td></tr>' for key, value in facts)
    label = escape(title)
    return f'<div class="card"><table class="facts-table" aria-label="{label}"><tbody>{rows}</tbody></table></div>'
