"""The rates that bound every other benchmark: reading, copying, integer and BF16 products.

resq bench peaks --device cuda --out peaks
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from resq_kernels.bench.device import INT8_CEILING, BenchDevice, Row, Work, nbytes

MODELS = ()
DEFAULTS: dict[str, object] = {}
WIDTH = {"cpu": 1024, "cuda": 8192}  # of the square BF16 product


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """One row: a square BF16 product of random matrices, checked in a few rows; the other rates
    are in `peaks`.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`; none is used.
        missing: receives the reason where the rate of integer products cannot be measured.
    """
    if bench.products_per_second is None:
        missing["integer products"] = (
            f"on a GPU: needs sm_90 and {INT8_CEILING.name} (docs/cuda.md); on a CPU: a compiler"
        )
    yield from bench.attempted(partial(_rows, bench))


def _rows(bench: BenchDevice) -> list[Row]:
    width = WIDTH[bench.device]
    a, b = torch.randn(2, width, width, device=bench.device, dtype=torch.bfloat16)
    product = a @ b
    expected = a[:4].cpu().double() @ b.cpu().double()
    error = (product[:4].cpu().double() - expected).norm() / expected.norm()
    if not error < 2.0**-7:  # rounding to BF16 costs 2^-9
        raise RuntimeError(f"peaks: BF16 product: expected an error below 2^-7, got {error:.2g}")
    work = Work(
        op="matmul bf16",
        place={"model": "square", "layer": "", "batch": width, "shape": [width] * 3},
        moved=nbytes(a, b, product),
        products=width**3,
        copies=True,
    )
    return bench.rows(work, bench.alternate({"ours": lambda i: a @ b}))
