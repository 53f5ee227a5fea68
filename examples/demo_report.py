"""The demo's report: one self-contained HTML file with tables and inline SVG plots.

python examples/demo_report.py out/demo/results.json    # the tables in Markdown, for README.md
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from resq_kernels import html_page

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = {
    "16-bit": "#000000",
    "RTN": "#d55e00",
    "rotation only": "#e69f00",
    "ResQ, RTN": "#56b4e9",
    "ResQ, GPTQ": "#0072b2",
    "ResQ, 8-bit activations": "#009e73",
}
HIGH_SHARE = 0.125

STYLE = ".ok { color: #00695c } .failed { color: #b00020; font-weight: bold } .note { color: #555 }"


def _shade_high(axes: Axes, count: int) -> None:
    """Marks the columns that ResQ keeps in 8 bits."""
    axes.axvspan(count * (1 - HIGH_SHARE), count, color="#0072b2", alpha=0.12, lw=0)


def spectrum_plot(models: Sequence[Mapping]) -> str:
    """Variance of each direction of the bases, by column: residual stream, keys, values."""
    figure, panels = html_page.figure(3, 11, 3.2)
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
    return html_page.svg(figure)


def _curves(values: Sequence) -> list[Sequence[float]]:
    """The innermost lists of a nested list: one curve per layer and head."""
    if not isinstance(values[0], Sequence):
        return [values]
    return [curve for part in values for curve in _curves(part)]


def perplexity_plot(models: Sequence[Mapping]) -> str:
    """How far each row's perplexity lies above the 16-bit one, with the perplexity on the bar."""
    figure, panels = html_page.figure(len(models), 11, 3.4)
    for axes, model in zip(panels, models, strict=True):
        baseline, *rows = model["rows"]
        heights = [100 * max(row["increase"], 1e-4) for row in rows]
        colours = [COLOURS[row["name"]] for row in rows]
        bars = axes.bar([row["name"] for row in rows], heights, color=colours)
        axes.bar_label(bars, [f"{row['perplexity']:.2f}" for row in rows], fontsize=8)
        axes.set_yscale("log")
        axes.set_title(f"{model['name']} (16-bit: {baseline['perplexity']:.2f})", fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    panels[0].set_ylabel("perplexity above 16-bit, %")
    return html_page.svg(figure)


def error_plot(models: Sequence[Mapping]) -> str:
    """Relative output error of every linear on the calibration text, in the order of the model."""
    figure, panels = html_page.figure(len(models), 11, 3.2)
    for axes, model in zip(panels, models, strict=True):
        for row in model["rows"]:
            if row["layers"]:
                errors = [layer["error"] for layer in row["layers"]]
                axes.semilogy(errors, color=COLOURS[row["name"]], marker=".", lw=1)
                axes.lines[-1].set_label(row["name"])
        axes.set_title(model["name"], fontsize=10)
        axes.set_xlabel("linear (q, k, v, o, gate, up, down of every layer)")
    panels[0].set_ylabel("relative output error of the weights")
    panels[0].legend(fontsize=8)
    return html_page.svg(figure)


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
        parts.append(html_page.table(_rows(model), HEADER))
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
        "</ul>",
    ]
    return html_page.page("ResQ demo", parts, STYLE)


def _outlier_note(outliers: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name.replace("_", " "), f"{values['before']:.1f}", f"{values['after']:.1f}")
        for name, values in outliers.items()
    ]
    return (
        "<p>The same function: symmetries of the architecture make a few channels large, as they "
        "are in large language models (examples/outliers.py says how). Largest channel over median "
        "channel:</p>" + html_page.table(rows, ("place", "before", "after"))
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


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
