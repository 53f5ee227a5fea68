"""quantization_report.json and .html: what was done, and how much each layer lost."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from resq_kernels import html_page
from resq_kernels.architecture import LINEARS, layer_prefix
from resq_kernels.ptq.basis import Basis
from resq_kernels.ptq.card import CARD
from resq_kernels.ptq.inputs import changes, file_changes, hashes
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.verdict import verdict_facts
from resq_kernels.ptq.workspace import REPORT_FILE, Workspace, error_piece, work_folder
from resq_kernels.safetensors_io import read_json, write_bytes, write_json

HTML_FILE = "quantization_report.html"


def layer_errors(model: SourceModel, work: Workspace) -> list[dict[str, object]]:
    """Name, rows, columns and relative output error of every quantized linear, in order."""
    rows: list[dict[str, object]] = []
    for index in range(model.shape.layers):
        errors = work.load(error_piece(index))
        for linear in LINEARS:
            name = layer_prefix(index) + linear
            size = dict(zip(("rows", "columns"), model.shape.linear(linear), strict=True))
            rows.append({"name": name, **size, "error": float(errors[linear])})
    return rows


def finished_report(out: Path, inputs: Mapping[str, Any]) -> dict[str, object]:
    """The report of a finished folder made from these inputs; removes a work folder left behind.

    The model card may have been edited: that is what it is for, and nothing depends on it.

    Raises:
        FileExistsError: it was made from other inputs, or its files are not those that were
            written; the message says which.
    """
    report = read_json(out / REPORT_FILE)
    written = {name: kept for name, kept in report.get("files", {}).items() if name != CARD}
    if changed := changes(report.get("inputs", {}), inputs):
        raise FileExistsError(
            f"{out}: is finished, but was made from other inputs: {changed}; use the same ones, "
            "remove the folder, or choose another OUT"
        )
    found = hashes(out, [out / name for name in written if (out / name).is_file()])
    if damaged := file_changes(written, found):
        raise FileExistsError(
            f"{out}: is finished, but not as it was written: {', '.join(damaged)}; remove the "
            "folder, or use it without --resume"
        )
    work = Workspace(work_folder(out))
    if work.root.is_dir():
        with suppress(FileExistsError):  # another process is about to remove it
            work.lock()
            work.remove()
    return report


def spectra(basis: Basis) -> dict[str, object]:
    """Variances along the bases, by column: "hidden" [hidden], "values" and "keys" per layer.

    Values are means over the kv heads of a layer.
    """
    return {
        "hidden": basis.hidden_variances.tolist(),
        "values": basis.value_variances.mean(1).tolist(),
        "keys": basis.key_variances.tolist(),
    }


def distillation_fact(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a distillation did, as a row of a table; no row if there was none."""
    return _training_fact("distillation", "KL", report.get("distillation", []))


def learning_fact(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What learning the rotations did, likewise."""
    return _training_fact("rotations", "loss", report.get("learning", []))


def _training_fact(name: str, loss: str, values: Sequence[float]) -> list[tuple[str, str]]:
    if not values:
        return []
    count = min(16, -(-len(values) // 2))
    first, last = (sum(part) / count for part in (values[:count], values[-count:]))
    text = f"{len(values)} steps, {loss} {first:.3f} in the first {count}, {last:.3f} in the last"
    return [(name, text)]


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes both files into a folder."""
    write_json(folder / REPORT_FILE, report)
    write_bytes(folder / HTML_FILE, render(report).encode())


def render(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page with drawn figures."""
    before, after = report["bytes_before"], report["bytes_after"]
    facts = [
        *((name, value.replace("+-", "±")) for name, value in verdict_facts(report)),
        ("method", _method(report)),
        ("size", f"{before / 1e6:.1f} MB to {after / 1e6:.1f} MB ({before / after:.2f} times)"),
        ("calibration", _calibration(report)),
        *learning_fact(report),
        *distillation_fact(report),
        ("time", f"{report['seconds']:.1f} s"),
    ]
    parts = [
        f"<h1>Quantization of {html.escape(report['model'])}</h1>",
        html_page.table(facts),
        "<h2>Relative output error of every linear</h2>",
        f"<p>||W x - W' x|| / ||W x|| over {_inputs(report['config'])}.</p>",
        _error_figure(report["layers"]),
    ]
    if "spectra" in report:
        parts.append("<h2>Variance along the bases</h2>")
        parts.append(
            "<p>Directions in the order of the bases; those right of the dashed line are kept in "
            "INT8.</p>"
        )
        parts.append(_spectrum_figure(report["spectra"], report["config"]["high_fraction"]))
    rows = [
        (row["name"], str(row["rows"]), str(row["columns"]), f"{row['error']:.5f}")
        for row in report["layers"]
    ]
    parts.append("<h2>All linears</h2>")
    parts.append(html_page.table(rows, ("linear", "rows", "columns", "error")))
    return html_page.page("Quantization report", parts)


def _method(report: Mapping[str, Any]) -> str:
    config, preset = report["config"], report["preset"]
    return f"{config['method']}, weights by {config['weights']}" + (
        f", preset {preset}" if preset else ""
    )


def _inputs(config: Mapping[str, Any]) -> str:
    """On which inputs errors are measured, in words."""
    rounded = "the calibration inputs x"
    exact = "the inputs x that the calibration would give if no activation were rounded"
    text = rounded if config["hessian_inputs"] == "rounded" else exact
    if config["token_weights"] == "uniform":
        return text
    return f"{text}; for q, k and v weighted by the attention that the tokens receive"


def _calibration(report: Mapping[str, Any]) -> str:
    windows = f"{report['windows']} windows of {report['seqlen']} tokens"
    if not report["dialogues"]:
        return windows
    return f"{windows}, of which the 16-bit model wrote {report['dialogues']}: dialogues"


def _error_figure(layers: Sequence[Mapping[str, Any]]) -> str:
    """One bar per linear, grouped by kind, layers from left to right."""
    kinds: dict[str, list[float]] = {}
    for row in layers:
        kinds.setdefault(row["name"].rsplit(".", 1)[1], []).append(row["error"])
    figure, (axis,) = html_page.figure(1, 10, 3)
    start, centres = 0.0, []
    for number, errors in enumerate(kinds.values()):
        places = torch.arange(len(errors)) + start
        axis.bar(places.tolist(), errors, width=0.85, color=html_page.COLOURS[number % 2])
        centres.append(start + (len(errors) - 1) / 2)
        start += len(errors) + 1
    axis.set_xticks(centres, list(kinds))
    axis.set_ylabel("relative error")
    axis.set_ylim(bottom=0)
    return html_page.svg(figure)


def _spectrum_figure(spectra: Mapping[str, Any], high_fraction: float) -> str:
    """Variance over direction: the residual stream, then values and keys, a line per layer."""
    figure, axes = html_page.figure(3, 11, 3)
    for axis, (name, title) in zip(
        axes,
        (("hidden", "residual stream"), ("values", "values"), ("keys", "keys")),
        strict=True,
    ):
        lines = spectra[name] if name != "hidden" else [spectra[name]]
        for number, variances in enumerate(lines):
            shade = 0.25 + 0.75 * (number + 1) / len(lines)
            axis.semilogy(variances, color=html_page.COLOURS[0], alpha=shade, linewidth=1)
        size = len(lines[0])
        axis.axvline(size * (1 - high_fraction) - 0.5, color=html_page.COLOURS[1], linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("direction")
    axes[0].set_ylabel("variance")
    return html_page.svg(figure)
