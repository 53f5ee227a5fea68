"""The rows of a benchmark as lines of text, as a Markdown table and as a plot (`--out`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_PLACE = ("op", "model", "layer", "shape", "kernel")
# Columns of `resq bench model` alone: key -> title, unit, digits.
_WHOLE_MODEL = {
    "layers": ("layers", 1, 0),
    "ours_tokens_per_s": ("tokens/s", 1, 1),
    "baseline_tokens_per_s": ("tokens/s of BF16", 1, 1),
    "ours_bytes": ("GB", 1e9, 2),
    "baseline_bytes": ("GB of BF16", 1e9, 2),
}
HEADER = f"{'op':27}{'model':14}{'layer':14}{'batch':>6}{'ours us':>11}{'TFLOP/s':>9}{'GB/s':>8}"
HEADER += f"{'share':>7}  {'baseline':20}{'its us':>11}{'ratio':>7}{'of best':>8}"


def line(row: Row) -> str:
    """One row as a line under HEADER; the last ratio compares the fastest call of each side."""
    text = f"{row['op']:27}{row['model']:14}{row['layer']:14}{row['batch']:6}"
    text += f"{row['ours_us']:11.1f}{_number(row['ours_tflops'], 2):>9}{row['ours_gb_per_s']:8.1f}"
    text += f"{row['ceiling_share']:7.1%}"
    if row["baseline"] is None:
        return text
    best = row["baseline_best_us"] / row["ours_best_us"]
    text += f"  {row['baseline']:20}{row['baseline_us']:11.1f}{row['ratio']:7.2f}{best:8.2f}"
    if "ours_tokens_per_s" in row:
        text += f"  {row['ours_tokens_per_s']:.1f} tokens/s, {row['ours_bytes'] / 1e9:.2f} GB"
        text += f"; {row['baseline_tokens_per_s']:.1f}, {row['baseline_bytes'] / 1e9:.2f} GB"
    return text


def markdown(figures: Mapping[str, Any]) -> str:
    """The command, machine and peaks, then a table: one line for each measured call of ours, with
    its ratio to every baseline."""
    rows = figures["rows"]
    names = list(dict.fromkeys(row["baseline"] for row in rows if row["baseline"]))
    titles = ["op", "model", "layer", "shape", "kernel", "us", "TFLOP/s", "GB/s", "share of bound"]
    ends = [f"ratio to {name}" for name in names]
    whole = [key for key in _WHOLE_MODEL if rows and key in rows[0]]
    ends += [title for key, (title, _, _) in _WHOLE_MODEL.items() if key in whole]
    lines = ["| " + " | ".join([*titles, *ends]) + " |"]
    lines.append("|" + "---|" * (len(titles) + len(ends)))
    for place in _places(rows).values():
        first = place[0]
        ratios = {row["baseline"]: row["ratio"] for row in place}
        cells = [str(first.get(key, "")) for key in _PLACE]
        cells += [f"{first['ours_us']:.1f}", _number(first["ours_tflops"], 2)]
        cells += [f"{first['ours_gb_per_s']:.1f}", f"{first['ceiling_share']:.1%}"]
        cells += [_number(ratios.get(name), 2) for name in names]
        for key in whole:
            _, unit, digits = _WHOLE_MODEL[key]
            cells.append(_number(first[key] / unit, digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_stamp(figures), "", *lines, ""])


def _stamp(figures: Mapping[str, Any]) -> list[str]:
    """The command, and a table of the machine, the peaks and what is missing."""
    machine = figures["machine"]
    lines = [f"`{figures['command']}`", "", "| | |", "|---|---|"]
    for key, value in {**machine, **machine.get("gpu", {}), **figures["peaks"]}.items():
        if key != "gpu" or not isinstance(value, Mapping):
            lines.append(f"| {key} | {value} |")
    for name, reason in figures["missing"].items():
        lines.append(f"| no {name} | {reason.replace('|', '/')} |")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speedup over each baseline by batch size, one panel for each op, model and layer."""
    import matplotlib.ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["ratio"] is not None:
            panels.setdefault((row["op"], row["model"], row["layer"]), []).append(row)
    columns = max(min(len(panels), 4), 1)
    height = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(4 * columns, 3.2 * height), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (place, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(height, columns, index + 1)
        for name in dict.fromkeys(row["baseline"] for row in panel):
            points = sorted((r["batch"], r["ratio"]) for r in panel if r["baseline"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set_title(" ".join(place), fontsize=9)
        axes.set_xlabel("M (rows or sequences)")
        axes.set_ylabel("times as fast as")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def write(prefix: Path, figures: Mapping[str, Any]) -> list[str]:
    """Writes PREFIX.md and PREFIX.png, each under a temporary name that is then replaced.

    Returns:
        A sentence for each file that could not be written: the plot, if matplotlib is missing.
    """
    _move(prefix, "md", lambda path: path.write_text(markdown(figures)))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return [f"no {prefix}.png: matplotlib is not installed"]
    _move(prefix, "png", lambda path: plot(figures["rows"], path))
    return []


def write_table(
    prefix: Path, figures: Mapping[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Writes PREFIX.md with other columns than those of `resq bench`'s rows."""
    table = [header, ["---"] * len(header), *rows]
    lines = [*_stamp(figures), "", *("| " + " | ".join(cells) + " |" for cells in table), ""]
    _move(prefix, "md", lambda path: path.write_text("\n".join(lines)))


def _move(prefix: Path, suffix: str, write_to: Callable[[Path], object]) -> None:
    target = Path(os.path.realpath(prefix.with_name(f"{prefix.name}.{suffix}")))
    partial = target.with_name(f".resq-{os.getpid()}.partial")
    try:
        write_to(partial)
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()


def _places(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The rows grouped by what was measured: a group has one time of ours, several baselines."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(key)) for key in (*_PLACE, "batch")), []).append(row)
    return found


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
