"""`resq compare`: folders against one reference, with confidence intervals."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resq_kernels import texts
from resq_kernels.commands import arguments, evaluate, loading, output
from resq_kernels.commands.comparison import (
    Folder,
    Result,
    Row,
    labels,
    make_rows,
    read_folder,
    seed_groups,
)
from resq_kernels.commands.output import CommandError, UsageError
from resq_kernels.intervals import LEVEL, Interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SUMMARY = "several models against one reference, with confidence intervals"
DESCRIPTION = """\
One table for any number of folders: perplexity, gap (cross entropy above the reference's), KL
divergence from the reference and top-1 agreement on the windows of `resq eval`, and the layers'
errors of each folder's quantization report. Gap and KL have 95 % intervals over the windows;
differences are taken window by window, those of KL from the first FOLDER.

examples:
  resq compare out/llama-rtn out/llama-resq --reference meta-llama/Llama-3.2-1B
  resq compare out/a out/b --reference ./model --text heldout.txt --json c.json --html c.html
  resq compare out/rtn-s* out/resq-s* --reference ./model --text heldout.txt --seeds
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq compare`."""
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="+", help="HF folder or hub name, 16-bit or quantized"
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        required=True,
        help="what they are compared with, usually the 16-bit model",
    )
    evaluate.add_text_arguments(parser, "without --text")
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="one row for the folders that differ in their seed alone: means over seeds, with "
        "intervals over the seeds instead of the windows",
    )
    parser.add_argument(
        "--html",
        type=arguments.file,
        metavar="FILE",
        help="also write the table and plots to FILE, a page of its own (whole or not at all)",
    )
    loading.add_lo_bits_argument(parser)
    loading.add_dtype_argument(parser)
    loading.add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Measures and prints; writes --html and then --json last.

    Raises:
        CommandError, UsageError, ValueError: a model, the text or an output cannot be used.
    """
    _check_usage(args)
    device = loading.choose_device(args.device)
    source = texts.WIKITEXT2 if args.text is None else args.text
    texts.check_source(source, "--text")
    names, count = [args.reference, *args.folders], len(args.folders)
    reference, *folders = map(read_folder, names, labels(names), [None, *[args.lo_bits] * count])
    if args.lo_bits is not None and all(folder.options is None for folder in folders):
        raise UsageError("--lo-bits: expected a FOLDER quantized by resq, got none")
    groups = seed_groups(folders) if args.seeds else None
    windows = _windows(args, source, reference, folders)
    base, results = _measure(reference, folders, windows, args.dtype, device)
    rows = shown = make_rows([[result] for result in results], base.measured)
    if groups is not None:
        shown = make_rows([[results[i] for i in g] for g in groups], base.measured, over_seeds=True)
    facts = _facts(args, source, windows)
    header, cells = _header(args.seeds), _cells(base, shown, args.seeds)
    print(output.table(cells, header))
    print(f"\n{output.table(facts)}")
    if args.html is not None:
        from resq_kernels.commands.compare_page import render

        output.write_text(args.html, render(args.reference, facts, header, cells, shown))
    figures = _figures(base, rows, source, windows)
    if groups is not None:
        figures["seeds"] = [_seed_figures(row) for row in shown]
    output.write_json(args.json, figures)


def _check_usage(args: argparse.Namespace) -> None:
    """Refuses files that cannot be written, and a folder that is given twice."""
    names = [args.reference, *args.folders]
    for option, path in (("--json", args.json), ("--html", args.html)):
        output.check_target(path, option, reads=[*names, args.text])
    if args.json and args.html and os.path.realpath(args.json) == os.path.realpath(args.html):
        raise UsageError(f"--html: expected another file than that of --json, got {args.html}")
    places = [os.path.realpath(name) for name in names]
    for place in places:
        same = [name for name, other in zip(names, places, strict=True) if other == place]
        if len(same) > 1:
            raise UsageError(f"FOLDER: expected every model once, got {' and '.join(same)}")


def _windows(
    args: argparse.Namespace, source: str, reference: Folder, folders: Sequence[Folder]
) -> torch.Tensor:
    """The windows of the text, int64 [windows, seqlen]; all models must read it alike.

    Raises:
        CommandError: vocabularies or tokenizers differ.
        UsageError, ValueError: windows are longer than a model's positions, or the text is short.
    """
    import torch

    from resq_kernels.evaluate import cut_windows

    words = reference.config.vocab_size
    for folder in folders:
        if folder.config.vocab_size != words:
            raise CommandError(
                f"{folder.name}: expected the vocabulary of {reference.name} ({words} words), got "
                f"{folder.config.vocab_size}: the divergence is defined over one vocabulary"
            )
    seqlen = min(loading.choose_seqlen(args.seqlen, f.config) for f in (reference, *folders))
    text = texts.load_text(source, "test")
    tokens = texts.tokenize(loading.load_tokenizer(reference.name), text)
    for folder in folders:
        own = texts.tokenize(loading.load_tokenizer(folder.name), text)
        if not torch.equal(own, tokens):
            shared = min(len(own), len(tokens))
            same = int((own[:shared] == tokens[:shared]).cumprod(0).sum())
            raise CommandError(
                f"{folder.name}: expected a tokenizer that reads the text as that of "
                f"{reference.name}, got another token at position {same}: the divergence is "
                "defined over one vocabulary"
            )
    return cut_windows(tokens, seqlen, args.max_windows)


def _measure(
    reference: Folder, folders: Sequence[Folder], windows: torch.Tensor, dtype: str, device: str
) -> tuple[Result, list[Result]]:
    """The reference and all folders on the windows.

    The reference stays in memory beside a batch of folders, and runs once a window for each batch.
    """
    model = loading.load_model(reference.name, dtype, device)
    batches, results = _batches(folders, reference.bytes), []
    for number, batch in enumerate(batches):
        progress = "compare" + (f" {number + 1}/{len(batches)}" if len(batches) > 1 else "")
        base, *found = _measure_batch(model, [reference, *batch], windows, dtype, device, progress)
        results += found
    return base, results


def _measure_batch(
    model: PreTrainedModel,
    folders: Sequence[Folder],
    windows: torch.Tensor,
    dtype: str,
    device: str,
    progress: str,
) -> list[Result]:
    """Results of folders, of which the first is the reference, `model`; loads the others."""
    from resq_kernels.evaluate import measure

    models = {folders[0].name: model}
    models |= {f.name: loading.load_model(f.name, dtype, device, f.lo_bits) for f in folders[1:]}
    found = measure(models, windows, progress=progress)
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}
    return [Result(f, found[f.name], dtypes[f.name]) for f in folders]


def _batches(folders: Sequence[Folder], room: int | None) -> list[list[Folder]]:
    """Folders in order, as many at a time as are together no larger than the reference (`room`
    bytes), but at least one; one where sizes are not known."""
    batches: list[list[Folder]] = []
    free = -1.0
    for folder in folders:
        size = math.inf if folder.bytes is None or room is None else folder.bytes
        if size > free:
            batches.append([])
            free = 0.0 if room is None else room
        batches[-1].append(folder)
        free -= size
    return batches


def _header(seeds: bool) -> list[str]:
    """Titles of the columns."""
    names = ["", "method", "W, A, KV bits", "size", "perplexity", "gap, nats", "KL, nats"]
    names += ["KL above first", "top-1", "layer error"]
    return [names[0], "seeds", *names[1:]] if seeds else names


def _cells(base: Result, rows: Sequence[Row], seeds: bool) -> list[list[str]]:
    """The reference and the rows as text."""
    folder = base.folder
    lines = [
        [
            folder.label,
            *(["-"] if seeds else []),
            *_what(base),
            f"{base.measured.perplexity:.4f}",
            *[""] * 5,
        ]
    ]
    for row in rows:
        error = row.layer_error
        lines.append(
            [
                row.label,
                *([str(len(row.results))] if seeds else []),
                *_what(row.results[0]),
                f"{row.perplexity:.4f}",
                _interval(row.gap, "+"),
                _interval(row.kl),
                "-" if row.kl_difference is None else _interval(row.kl_difference, "+"),
                f"{row.top1.mean:.2%}",
                "-" if error is None else f"{error:.4f}",
            ]
        )
    return lines


def _what(result: Result) -> list[str]:
    """Method, bits and size of a folder."""
    folder, bits = result.folder, result.folder.bits
    if bits is not None:
        parts = (bits[name] for name in ("weights", "activations", "kv"))
        widths = ", ".join("/".join(map(str, part)) for part in parts)
    else:
        widths = result.dtype if folder.method is None else "-"
    return [
        folder.method or "-",
        widths,
        "-" if folder.bytes is None else output.size(folder.bytes),
    ]


def _interval(interval: Interval, sign: str = "") -> str:
    half = "-" if interval.half is None else f"{interval.half:.4f}"
    return f"{interval.mean:{sign}.4f} +- {half}"


def _facts(args: argparse.Namespace, source: str, windows: torch.Tensor) -> list[tuple[str, str]]:
    """What the table is of."""
    count, seqlen = windows.shape
    level = f"{100 * LEVEL:g} % interval of the mean"
    over = f"{level} over {count} windows (Student's t)"
    if args.seeds:
        over = f"{level} over the means of the seeds (Student's t); - for one seed"
    elif count == 1:
        over = "- : one window has no interval"
    return [
        ("reference", args.reference),
        ("text", source),
        ("tokens", f"{count * seqlen} ({count} windows of {seqlen})"),
        ("+-", over),
    ]


def _figures(
    base: Result, rows: Sequence[Row], source: str, windows: torch.Tensor
) -> dict[str, Any]:
    """What --json writes."""
    return {
        "reference": _folder_figures(base) | {"perplexity": base.measured.perplexity},
        "text": source,
        "tokens": windows.numel(),
        "seqlen": windows.shape[1],
        "windows": windows.shape[0],
        "level": LEVEL,
        "folders": [
            {
                **_folder_figures(row.results[0]),
                **row.figures(),
                "layers": [{"name": p.name, "error": p.error} for p in row.layers] or None,
                "window_kl": row.results[0].measured.divergences,
                "window_top1": row.results[0].measured.agreements,
            }
            for row in rows
        ],
    }


def _folder_figures(result: Result) -> dict[str, Any]:
    folder, measured = result.folder, result.measured
    return {
        "model": folder.name,
        "method": folder.method,
        "bits": folder.bits,
        "dtype": result.dtype,
        "quantization": folder.quantization,
        "bytes": folder.bytes,
        "seconds": measured.seconds,
        "window_loss": measured.losses,
    }


def _seed_figures(row: Row) -> dict[str, Any]:
    folders = [result.folder for result in row.results]
    return {
        "models": [folder.name for folder in folders],
        "seeds": [None if f.options is None else f.options.seed for f in folders],
        **row.figures(),
    }
