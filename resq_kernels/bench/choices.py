"""mixed_gemm on a GPU with every kernel, tile and split of K that a shape may run (`--choices`).

The dispatch predicts times (csrc/ops/mixed_gemm/mixed_gemm_choice.h); here they are measured. Every
choice must give the bits of the one that the dispatch takes, and that one those of the reference.
tools/fit_mixed_gemm.py makes the dispatch's constants from the records (note 0027).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from resq_kernels.bench import cuda_timing, models
from resq_kernels.bench.device import BenchDevice, Row, first_line
from resq_kernels.bench.gemm import Layer
from resq_kernels.formats import MixedTensor

VARIABLE = "RESQ_MIXED_GEMM"
SECONDS = 0.01  # of timing for a choice: 2772 of four layers and nine sizes in half a minute
CHECKED_ROWS = 4  # of a batch, against the reference, which is slow
HEADER = ["model", "layer", "M", "chosen us", "best us", "regret", "failed", "chosen", "best"]


@contextmanager
def forced(op: str, choice: str) -> Iterator[None]:
    """Inside, calls of `op` from this thread run `choice`."""
    before = torch.ops.resq.force_kernel(op, choice)
    try:
        yield
    finally:
        torch.ops.resq.force_kernel(op, before)


def sweep(bench: BenchDevice, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Times every choice of every model, layer and batch; yields the records of one batch at once.

    A choice that fails has its `error` and no times.

    Args:
        bench: the GPU; its `failures` receive the products of which choices are wrong or failed,
            and the layers in which the dispatch's own choice is wrong or a lost device ended.
        args: the options of `resq bench`: shapes, batch.

    Raises:
        ValueError: the environment forces a choice already.
    """
    if os.environ.get(VARIABLE):
        raise ValueError(f"--choices: expected {VARIABLE} to be unset, got {os.environ[VARIABLE]}")
    for model in args.shapes:
        for shape in models.layers(model):
            yield from bench.attempted(partial(layer_records, bench, model, shape, args.batch))


def layer_records(
    bench: BenchDevice, model: str, shape: tuple[str, int, int, int], batches: list[int]
) -> Iterator[list[Row]]:
    """The records of one layer, batch by batch."""
    layer = Layer.random(bench, shape, batches)
    results = layer.checked_products(model, CHECKED_ROWS)
    for activation, y in zip(layer.activations, results, strict=True):
        arguments = layer.kernel_arguments(activation)
        chosen = str(torch.ops.resq.mixed_gemm_kernel(*arguments))
        place: Row = {"model": model, "layer": layer.name}
        place |= zip(("m", "n", "k_lo", "k_hi", "packed"), arguments[:-1], strict=True)
        bound = layer.moved(activation) / bench.read_bandwidth * 1e6
        place["memory_bound_us"] = round(bound, 3)
        records = [
            place
            | {"choice": choice, "chosen": choice == chosen}
            | measured(layer, activation, y, choice, bench.rounds)
            for choice in torch.ops.resq.mixed_gemm_choices(*arguments)
        ]
        if wrong := [record for record in records if record["error"]]:
            bench.failures.append(
                f"mixed_gemm: {model} {layer.name} M = {place['m']}: {len(wrong)} of "
                f"{len(records)} choices failed, first {wrong[0]['choice']}: {wrong[0]['error']}"
            )
        yield records
        # An error that the device keeps fails every later call too; the records are written by now.
        torch.cuda.synchronize()


def measured(
    layer: Layer, activation: MixedTensor, expected: torch.Tensor, choice: str, rounds: int
) -> Row:
    """Times of one choice, or its error."""
    row: Row = {"us": None, "best_us": None, "calls": 0, "error": None}
    call = partial(layer.product, activation)
    try:
        with forced("mixed_gemm", choice):
            if not torch.equal(call(0), expected):
                return row | {"error": "differs from the result of the dispatch's choice"}
            time = cuda_timing.alone(call, SECONDS, rounds)
    except RuntimeError as error:
        return row | {"error": first_line(error)}
    times = {"us": round(time.median_us, 3), "best_us": round(time.best_us, 3)}
    return row | times | {"calls": time.calls}


def line(texts: Sequence[str]) -> str:
    """HEADER, or cells under it, as text."""
    widths = (14, 9, 6, 11, 10, 8, 8, 24, 24)
    padded = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
    return "".join(padded).rstrip()


def cells(records: Sequence[Mapping[str, object]]) -> list[str]:
    """The records of one batch as a line under HEADER; regret is the chosen time over the best."""
    first = records[0]
    place = [str(first[key]) for key in ("model", "layer", "m")]
    times = {str(r["choice"]): float(str(r["us"])) for r in records if r["us"] is not None}
    chosen = next((str(r["choice"]) for r in records if r["chosen"]), "")
    failed = str(len(records) - len(times))
    if not times:
        return [*place, "", "", "", failed, chosen, ""]
    best = min(times, key=lambda choice: times[choice])
    if chosen not in times:
        return [*place, "", f"{times[best]:.2f}", "", failed, chosen, best]
    figures = [f"{times[chosen]:.2f}", f"{times[best]:.2f}", f"{times[chosen] / times[best]:.3f}"]
    return [*place, *figures, failed, chosen, best]
