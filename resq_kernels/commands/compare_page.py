"""The page of `resq compare --html`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from resq_kernels import html_page
from resq_kernels.commands.comparison import Row
from resq_kernels.intervals import Interval


def render(
    reference: str,
    facts: Sequence[tuple[str, str]],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[Row],
) -> str:
    """The table and the plots as one self-contained page.

    Args:
        reference: name of the reference.
        facts: what the table is of, names and values.
        header, cells: the table as it is printed, the reference first.
        rows: of the table.
    """
    title = f"Comparison with {reference}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        html_page.table([[_sign(cell) for cell in line] for line in cells], header),
        html_page.table([(_sign(name), value) for name, value in facts]),
        "<p>Gap: cross entropy above the reference's. KL: mean divergence from the reference. "
        "Top-1: how often both find the same token likeliest. Layer error: mean of the linears' "
        "relative output errors, each folder's on the text that it was calibrated with.</p>",
        "<h2>KL and gap</h2>",
        _interval_figure(rows),
    ]
    if any(row.layers for row in rows):
        parts += [
            "<h2>Relative output error of the layers</h2>",
            "<p>||W x - W' x|| / ||W x||, from each folder's quantization report; means over the "
            "linears of a layer, and over the layers.</p>",
            _layer_figure(rows),
        ]
    if missing := [row.label for row in rows if not row.layers]:
        parts.append(f"<p>Without a quantization report: {html.escape(', '.join(missing))}.</p>")
    return html_page.page(title, parts, "body { max-width: 76rem } td { white-space: nowrap }")


def _sign(text: str) -> str:
    return text.replace("+-", "±")


def _colour(number: int) -> str:
    return html_page.COLOURS[number % len(html_page.COLOURS)]


def _interval_figure(rows: Sequence[Row]) -> str:
    """KL and gap with their intervals, a line of each row from the top down."""
    drawn, (kl, gap) = html_page.figure(2, 10, 1 + 0.35 * len(rows))
    for axis, title in ((kl, "KL, nats"), (gap, "gap, nats")):
        axis.set_xlabel(title)
        axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    for number, row in enumerate(rows):
        for axis, interval in ((kl, row.kl), (gap, row.gap)):
            _point(axis, number, interval)
    names = [row.label for row in rows]
    kl.set_yticks(range(len(rows)), names)
    gap.set_yticks(range(len(rows)), [""] * len(rows))
    return html_page.svg(drawn)


def _point(axis: Any, number: int, interval: Interval) -> None:
    axis.errorbar(
        interval.mean,
        number,
        xerr=interval.half,
        fmt="o",
        capsize=4,
        color=_colour(number),
    )


def _layer_figure(rows: Sequence[Row]) -> str:
    """Errors by layer and by kind of linear, a line of each row that has them."""
    drawn, (by_layer, by_kind) = html_page.figure(2, 10, 3.2)
    for number, row in enumerate(rows):
        if not row.layers:
            continue
        layers: dict[int, list[float]] = {}
        kinds: dict[str, list[float]] = {}
        for place in row.layers:
            layers.setdefault(place.layer, []).append(place.error)
            kinds.setdefault(place.kind.removesuffix("_proj"), []).append(place.error)
        line = ("-", "--", ":")[number // len(html_page.COLOURS) % 3]
        style = {"color": _colour(number), "linestyle": line, "marker": ".", "linewidth": 1}
        by_layer.plot(list(layers), [fmean(errors) for errors in layers.values()], **style)
        by_kind.plot(list(kinds), [fmean(errors) for errors in kinds.values()], **style)
        by_kind.lines[-1].set_label(row.label)
    by_layer.set_xlabel("layer")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    by_layer.set_ylabel("relative error")
    by_layer.set_ylim(bottom=0)
    by_kind.set_ylim(bottom=0)
    by_kind.legend(fontsize=8)
    return html_page.svg(drawn)
