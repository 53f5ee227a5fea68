"""Self-contained HTML pages with tables and drawn figures."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

# Of Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
td:first-child, th:first-child, .facts td { text-align: left }
td:first-child, th:first-child { padding-left: 0 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } p { color: #444 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of HTML elements; nothing in it is loaded from elsewhere.

    Args:
        title: as text.
        parts: elements in order.
        style: CSS rules of this page.
    """
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        f"</title><style>{_STYLE}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of cells that are text; without a header, a list of names and values."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    start = ["<table>", line(header, "th")] if header else ["<table class='facts'>"]
    return "\n".join([*start, *(line(row, "td") for row in rows), "</table>"])


def figure(columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    """A figure of matplotlib that needs no display, and its axes from left to right.

    Args:
        columns: number of axes.
        width, height: in inches.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(drawn)
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
    return drawn, axes


def svg(drawn: Any) -> str:
    """A figure as an <svg> element, its text as text; the same figure gives the same element."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "resq"}):
        drawn.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
