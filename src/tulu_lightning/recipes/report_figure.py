"""What all figures of the report have in common: colours, axes, legend, caption.

Colours are of middle lightness, at least 3:1 against both the light and the dark page; text and grid lines are
coloured by the page's style sheet, so a chart follows the reader's theme without being drawn again.
"""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "RED", "VIOLET", "layout", "legend", "wrap"]

BLUE, ORANGE, GREEN, VIOLET, RED, GREY = "#3b7dd8", "#d0702a", "#1a9c82", "#8a6ad6", "#d14b62", "#7d8590"

plotly.io.json.config.default_engine = "json"  # orjson, taken where it is installed, refuses half a surrogate pair


def layout(height: int) -> dict[str, Any]:
    """Plotly's layout of one pair of axes, `height` pixels high; transparent, so that the page shows through."""
    axis = {"automargin": True, "fixedrange": True, "zeroline": False, "tickfont": {"size": 11}}
    axis |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": False,
        "dragmode": False,
        "hoverlabel": {"bgcolor": "#20242c", "bordercolor": "#20242c", "font": {"color": "#ffffff", "size": 12}},
        "xaxis": {**axis, "showgrid": False, "nticks": 7, "unifiedhovertitle": {"text": "step %{x}"}},
        "yaxis": {**axis, "nticks": 5, "showgrid": True},
    }


def legend(labels: Sequence[str], colours: Sequence[str]) -> str:
    """What each colour stands for, as HTML that follows the page's theme."""
    items = zip(labels, colours, strict=True)
    return "".join(f'<span class="key"><i style="background:{c}"></i>{html.escape(label)}</span>' for label, c in items)


def wrap(title: str, note: str, keys: str, figure: go.Figure, name: str) -> str:
    """The figure under its caption.

    Args:
        title: in bold; `note` follows it.
        note: what is drawn, in a few words, and what to look for.
        keys: from `legend`; empty for none.
        figure: its layout has a height.
        name: a plain word, different for every figure of the page.
    """
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        default_height=f"{figure.layout.height}px",
        config={"responsive": True, "displayModeBar": False},
    )
    note = f"<small>{html.escape(note)}</small>" if note else ""
    keys = f'<div class="keys">{keys}</div>' if keys else ""
    caption = f"<figcaption><b>{html.escape(title)}</b> {note}{keys}</figcaption>"
    return f'<figure class="chart">{caption}<div class="plot">{plot}</div></figure>'
