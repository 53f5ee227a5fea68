"""Predicts mixed_gemm's time at every layer, M and chip, beside cuBLAS's; nothing is measured.

The time of a choice is that of csrc/ops/mixed_gemm/mixed_gemm_time.h, which the dispatch minimises,
with the constants of the chip's row of mixed_gemm_tuning.h; a launch comes on top. The same product
in BF16 or FP8 takes the longer of reading the weight and multiplying at the share of the peak that
cuBLAS is known to reach, and its launch. `limit` names what a cell of ours waits for: memory, L2,
shared memory, tensor cores, waves (multiprocessors without work a fifth of the time) or latency
(half of the time is start, epilogue, exchange of sums or a second launch).

    python tools/predict_mixed_gemm.py                  print the smallest ratios by M
    python tools/predict_mixed_gemm.py --json PATH      and write a row for every cell
    python tools/predict_mixed_gemm.py --cells h200 llama-3-8b    print the cells of a model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fit_mixed_gemm import Library, Shape

from resq_kernels.bench import models

LAUNCH = 0.6  # us between two kernels of a stream or graph, without what `start` counts; assumed
LONG = 50.0  # us of products, from which on power decides the clock; assumed
CUBLAS_LAUNCH = 1.5  # us of launch, start and end of a product; assumed
MODELS = ("llama-3.2-1b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b", "qwen2.5-72b")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# M up to -> least ratio to BF16 on an H200; decode by the size of the weight in MB.
TARGETS = {64: 2.9, 128: 2.3, 256: 1.6, 1024: 1.0, 16384: 1.75}
DECODE_ROWS, BIG, BIG_TARGET, MIDDLE, MIDDLE_TARGET = 16, 60, 3.2, 8, 2.3


class Chip(NamedTuple):
    """A row of mixed_gemm_tuning.h, and what is known of the chip beside it.

    Attributes:
        facts: compute capability (two numbers), multiprocessors, bits of the memory bus.
        family: of kernels.
        megahertz: of the multiprocessors, and where they multiply for long: power.
        memory: TB/s that it reaches.
        bf16: TFLOP/s of dense BF16 products, peak; fp8 likewise, None where there are none.
        share: of both peaks that cuBLAS reaches.
    """

    facts: tuple[int, int, int, int]
    family: str
    megahertz: tuple[int, int]
    memory: float
    bf16: float
    fp8: float | None
    share: float


CHIPS = {
    "h100": Chip((9, 0, 132, 5120), "sm90", (1700, 1400), 3.0, 989, 1979, 0.75),
    "h200": Chip((9, 0, 132, 6144), "sm90", (1700, 1400), 4.3, 989, 1979, 0.75),
    "a100": Chip((8, 0, 108, 5120), "sm80", (1410, 1410), 1.75, 312, None, 0.87),
    "rtx4090": Chip((8, 9, 128, 384), "sm80", (2520, 2520), 0.94, 165, 330, 0.93),
}

Row = dict[str, object]


def cublas(chip: Chip, m: int, n: int, k: int, peak: float, weight_bytes: int) -> float:
    """Microseconds of the product with a weight of so many bytes a value."""
    reading = weight_bytes * n * k / chip.memory / 1e6
    return max(reading, 2 * m * n * k / (peak * chip.share) / 1e6) + CUBLAS_LAUNCH


def target(m: int, megabytes: float) -> float:
    """The least ratio to BF16 that is asked for on an H200."""
    if m > DECODE_ROWS:
        return next(ratio for rows, ratio in TARGETS.items() if m <= rows)
    return BIG_TARGET if megabytes >= BIG else MIDDLE_TARGET if megabytes >= MIDDLE else 1.0


def cells(library: Library, name: str) -> Iterator[Row]:
    """A row for each model, layer and M on a chip."""
    chip = CHIPS[name]
    values = library.values(chip.facts)
    for model in MODELS:
        for layer, n, k, k_hi in models.layers(model):
            packed = chip.family == "sm80"
            shapes = [Shape(m, n, k - k_hi, k_hi, packed) for m in ROWS]
            array = (Shape * len(shapes))(*shapes)
            predicted = library.predict(values, chip.family, chip.facts[2], array)
            megabytes = n * ((k - k_hi) / 2 + k_hi) / 1e6
            for m, (choice, limit, clocks) in zip(ROWS, predicted, strict=True):
                us = clocks / chip.megahertz[0]
                if limit == "tensor cores" and us > LONG:
                    us = clocks / chip.megahertz[1]
                us = round(us + LAUNCH, 2)
                bf16_us = round(cublas(chip, m, n, k, chip.bf16, 2), 2)
                fp8_us = chip.fp8 and round(cublas(chip, m, n, k, chip.fp8, 1), 2)
                yield {
                    "chip": name, "model": model, "layer": layer, "m": m, "n": n, "k": k,
                    "k_hi": k_hi, "choice": choice, "us": us, "bf16_us": bf16_us,
                    "fp8_us": fp8_us, "ratio": round(bf16_us / us, 2), "limit": limit,
                    "target": target(m, megabytes) if name == "h200" else None,
                }  # fmt: skip


def summary(rows: Sequence[Row]) -> str:
    """The smallest and largest ratio by chip and M, and how many cells of an H200 miss."""
    lines = [f"{'chip':8}" + "".join(f"{m:>12}" for m in ROWS)]
    for chip in CHIPS:
        ratios = {m: [r["ratio"] for r in rows if (r["chip"], r["m"]) == (chip, m)] for m in ROWS}
        text = "".join(f"{min(at):6.2f}-{max(at):<5.2f}" for at in ratios.values())
        lines.append(f"{chip:8}{text}")
    missed = [r for r in rows if r["target"] is not None and r["ratio"] < r["target"]]
    counts = "".join(f"{sum(r['m'] == m for r in missed):>12}" for m in ROWS)
    return "\n".join([*lines, f"{'missed':8}{counts}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--cells", nargs=2, metavar=("CHIP", "MODEL"), help="print these cells")
    options = parser.parse_args(arguments)
    library = Library()
    rows = [row for chip in CHIPS for row in cells(library, chip)]
    print(summary(rows))
    if options.cells:
        for row in rows:
            if [row["chip"], row["model"]] == options.cells:
                print(
                    f"{row['layer']:8}{row['m']:6}  {row['choice']:24}{row['us']:9.2f}"
                    f"{row['bf16_us']:9.2f}{row['ratio']:6.2f} of {row['target'] or '-':4}  "
                    f"{row['limit']}"
                )
    if options.json:
        text = ",\n".join(json.dumps(row) for row in rows)
        partial = options.json.with_name(f".{options.json.name}.partial")
        partial.write_text(f"[\n{text}\n]\n")
        partial.replace(options.json)


if __name__ == "__main__":
    main()
