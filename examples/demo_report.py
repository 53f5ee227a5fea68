"""The demo's report: one self-contained HTML file with tables and inline SVG plots.

python examples/demo_report.py out/demo/results.json    # the tables in Markdown, for README.md
"""

from __future__ import annotations

import html
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = {
    "16-bit": "#000000",
    "RTN": "#d55e00",
    "rotation only": "#e69f00",
    "ResQ, RTN": "#56b4e9",
    "ResQ, GPTQ": "#0072b2",
}
HIGH_SHARE = 0.125

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1c1c1c; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #e2e2e2; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
.ok { color: #00695c; } .failed { color: #b00020; font-weight: bold; }
.note { color: #555; } svg { max-width: 100%; height: auto; }
"""


def svg(figure: Figure) -> str:
    """A figure as an <svg> element, without the XML header."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "resq"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _shade_high(axes: Axes, count: int) -> None:
    """Marks the columns that ResQ keeps in 8 bits."""
    axes.axvspan(count * (1 - HIGH_SHARE), count, color="#0072b2", alpha=0.12, lw=0)


def spectrum_plot(models: Sequence[Mapping]) -> str:
    """Variance of each principal direction, ascending: residual stream, keys, values."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    titles = {"hidden": "inputs from the residual stream", "keys": "keys", "values": "values"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for model, style in zip(models, ("-", "--"), strict=False):
            for index, values in enumerate(_curves(model["spectra"][name])):
                label = model["name"] if index == 0 else None
                colour = {"-": "#0072b2", "--": "#d55e00"}[style]
                axes.semilogy(values, style, color=colour, lw=1.2, label=label)
        _shade_high(axes, len(values))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("direction, by variance")
    panels[0].set_ylabel("variance")
    panels[0].legend(fontsize=8)
    return svg(figure)


def _curves(values: Sequence) -> list[Sequence[float]]:
    """The innermost lists of a nested list: one curve per layer and head."""
    if not isinstance(values[0], Sequence):
        return [values]
    return [curve for part in values for curve in _curves(part)]


def perplexity_plot(models: Sequence[Mapping]) -> str:
    """How far each row's perplexity lies above the 16-bit one, with the perplexity on the bar."""
    figure, panels = plt.subplots(
        1, len(models), figsize=(11, 3.4), constrained_layout=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        baseline, *rows = model["rows"]
        heights = [100 * max(row["increase"], 1e-4) for row in rows]
        colours = [COLOURS[row["name"]] for row in rows]
        bars = axes.bar([row["name"] for row in rows], heights, color=colours)
        axes.bar_label(bars, [f"{row['perplexity']:.2f}" for row in rows], fontsize=8)
        axes.set_yscale("log")
        axes.set_title(f"{model['name']} (16-bit: {baseline['perplexity']:.2f})", fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    panels[0, 0].set_ylabel("perplexity above 16-bit, %")
    return svg(figure)


def error_plot(models: Sequence[Mapping]) -> str:
    """Relative output error of every linear on the calibration text, in the order of the model."""
    figure, panels = plt.subplots(
        1, len(models), figsize=(11, 3.2), constrained_layout=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        for row in model["rows"]:
            if row["layers"]:
                errors = [layer["error"] for layer in row["layers"]]
                axes.semilogy(errors, color=COLOURS[row["name"]], marker=".", lw=1)
                axes.lines[-1].set_label(row["name"])
        axes.set_title(model["name"], fontsize=10)
        axes.set_xlabel("linear (q, k, v, o, gate, up, down of every layer)")
    panels[0, 0].set_ylabel("relative output error of the weights")
    panels[0, 0].legend(fontsize=8)
    return svg(figure)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>\n{line(header, 'th')}\n{body}\n</table>"


def row_name(row: Mapping) -> str:
    """The name, of the 16-bit row with the dtype that it ran in."""
    return f"{row['name']}, run in {row['dtype']}" if row["name"] == "16-bit" else row["name"]


def above(increase: float) -> str:
    """How far a perplexity lies above the 16-bit one; beyond 1000 % in times."""
    return f"{increase:+.2%}" if increase < 10 else f"{1 + increase:.0f} times"


def _rows(model: Mapping) -> list[tuple[str, ...]]:
    return [
        (
            row_name(row),
            f"{row['perplexity']:.3f}",
            "" if row["quantize_seconds"] is None else above(row["increase"]),
            "" if row["quantize_seconds"] is None else f"{row['kl_to_baseline']:.4f}",
            "" if row["quantize_seconds"] is None else f"{row['top1_agreement']:.1%}",
            f"{row['bytes_total'] / 1e6:.2f}",
            f"{row['bytes_linears'] / 1e6:.2f}",
            f"{row['decode_tokens_per_second']:.0f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            "" if row["quantize_seconds"] is None else f"{row['quantize_seconds']:.1f}",
        )
        for row in model["rows"]
    ]


HEADER = (
    "",
    "perplexity",
    "above 16-bit",
    "KL, nats",
    "top-1",
    "checkpoint, MB",
    "linears, MB",
    "decode, tokens/s",
    "prefill, tokens/s",
    "quantized in, s",
)


def render(results: Mapping) -> str:
    """The whole page.

    Args:
        results: the content of results.json.
    """
    models = results["models"]
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>ResQ demo</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(results['title'])}: 16 bits against 4</h1>",
        "<p>Weights, activations and KV cache in 4 bits; ResQ keeps the eighth of every dimension "
        "that carries most variance in 8. Every quantized row was saved as a Hugging Face folder, "
        "loaded again and run through the real kernels. KL: mean divergence from the 16-bit model; "
        "top-1: how often both find the same token likeliest.</p>",
        f"<p>{html.escape(results['note'])}</p>",
        f"<p class='note'>{html.escape(machine_line(results))}</p>",
    ]
    for model in models:
        parts.append(f"<h2>{html.escape(model['name'])}</h2>")
        if model["outliers"]:
            parts.append(_outlier_note(model["outliers"]))
        parts.append(html_table(HEADER, _rows(model)))
        parts.append(f"<pre>{html.escape(model['samples'])}</pre>")
    parts += [
        "<h2>Perplexity</h2>",
        perplexity_plot(models),
        "<h2>Variance of the principal directions</h2>",
        "<p>Shaded: the eighth of the directions that ResQ stores in 8 bits. One curve per layer "
        "(and head) for keys and values.</p>",
        spectrum_plot(models),
        "<h2>Error of every linear</h2>",
        error_plot(models),
        "<h2>Checks</h2><ul>",
        *(
            f"<li class='{'ok' if c['ok'] else 'failed'}'>"
            + html.escape(
                f"{'ok' if c['ok'] else 'FAILED'}: {c['model']}: {c['promise']} ({c['measured']})"
            )
            + "</li>"
            for c in results["checks"]
        ),
        "</ul></body></html>",
    ]
    return "\n".join(parts)


def _outlier_note(outliers: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name.replace("_", " "), f"{values['before']:.1f}", f"{values['after']:.1f}")
        for name, values in outliers.items()
    ]
    return (
        "<p>The same function: symmetries of the architecture make a few channels large, as they "
        "are in large language models (examples/outliers.py says how). Largest channel over median "
        "channel:</p>" + html_table(("place", "before", "after"), rows)
    )


def machine_line(results: Mapping) -> str:
    """Where the run was, and how long it took."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']} kernels; "
        f"torch {versions['torch']}, Python {versions['python']}; {results['seconds']:.0f} s."
    )


def markdown(results: Mapping) -> str:
    """The tables as README.md shows them.

    Args:
        results: the content of results.json.
    """
    parts = []
    for model in results["models"]:
        lines = [
            "| weights, activations, KV cache | perplexity | KL to 16-bit, nats | top-1 agreement "
            "| checkpoint | decode, tokens/s | prefill, tokens/s |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in model["rows"]:
            baseline = row["quantize_seconds"] is None
            cells = (
                f"**{row_name(row)}**" if row["name"] == "ResQ, GPTQ" else row_name(row),
                f"{row['perplexity']:.2f}" + ("" if baseline else f" ({above(row['increase'])})"),
                "" if baseline else f"{row['kl_to_baseline']:.3f}",
                "" if baseline else f"{row['top1_agreement']:.1%}",
                f"{row['bytes_total'] / 1e6:.3g} MB",
                f"{row['decode_tokens_per_second']:.0f}",
                f"{row['prefill_tokens_per_second']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        parts += [f"{model['name']}, {machine_line(results)}", "\n".join(lines)]
    return "\n\n".join([*parts, results["note"]])


def write_report(path: Path, results: Mapping) -> None:
    """Writes the page to a temporary name and moves it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(render(results), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
