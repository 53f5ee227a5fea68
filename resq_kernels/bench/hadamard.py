"""hadamard at the widths of a model's MLP, compared with the matrix products a user would write.

Every result is compared with the float64 transform before it is timed. The bound of a row is the
bytes of input and output / the measured bandwidth of a copy.

    resq bench hadamard --shapes llama-3-8b,qwen2.5-7b --batch 1,16,512
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

from resq_kernels import hadamard, ops
from resq_kernels.bench import models
from resq_kernels.bench.device import BenchDevice, Row, Work, evenly_spaced, nbytes

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3-8b"], "batch": [1, 16, 512]}
# Half a BF16 ulp, plus the rounding of float32 sums of normal values. One input with the wrong sign
# would move every output by 2 / sqrt(n), which is 1e-2 at the largest width.
RELATIVE, ABSOLUTE = 2.0**-8, 2.0**-12


def kron_transform(
    n: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], torch.Tensor]:
    """H x / sqrt(n) as two dense products in `dtype`: H = kron(A, B), both about sqrt(n) wide."""
    *orders, power = hadamard.factors(n)
    outer = torch.ones(1, 1, dtype=torch.int64)
    for order in orders:
        outer = torch.kron(outer, hadamard.paley(order))
    inner = power
    while inner > 1 and len(outer) * (power // inner) < inner:
        inner //= 2
    outer = torch.kron(outer, hadamard.sylvester(power // inner))
    a, b = (m.to(device, dtype) for m in (outer, hadamard.sylvester(inner)))

    def transform(x: torch.Tensor) -> torch.Tensor:
        tiles = x.to(dtype).reshape(-1, len(a), len(b))
        y = ((a @ tiles) @ b).view(x.shape) * n**-0.5  # Sylvester's matrix is symmetric
        return y.to(x.dtype)

    return transform


def agrees(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether y is the transform of x, in rows `evenly_spaced`."""
    rows = evenly_spaced(len(x))
    expected = hadamard.transform(x.cpu()[rows].double())
    allowed = RELATIVE * expected.abs() + ABSOLUTE * x.double().square().mean().sqrt().cpu()
    return bool(((y.cpu()[rows].double() - expected).abs() <= allowed).all())


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every width and batch.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch.
        missing: stays as it is: torch always has these baselines.
    """
    for model in args.shapes:
        width = models.shape(model).intermediate
        others = {"torch matmul bf16": kron_transform(width, bench.device, torch.bfloat16)}
        if not bench.on_gpu:  # faster than bf16 on CPUs without BF16 instructions
            others["torch matmul fp32"] = kron_transform(width, bench.device, torch.float32)
        for m in args.batch:
            x = torch.randn(m, width, device=bench.device, dtype=torch.bfloat16)
            yield from bench.attempted(partial(_rows, bench, model, x, others))


def _rows(
    bench: BenchDevice,
    model: str,
    x: torch.Tensor,
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]],
) -> list[Row]:
    shape, y = list(x.shape), ops.hadamard(x)
    if not agrees(y, x):
        size = "x".join(map(str, shape))
        raise RuntimeError(f"hadamard: {model} {size}: differs from the reference")
    data = bench.copies(x)
    candidates = {
        name: lambda i, f=f: f(data[i % len(data)])
        for name, f in {"ours": ops.hadamard, **others}.items()
    }
    place: Row = {"model": model, "layer": "down", "batch": shape[0], "shape": shape}
    work = Work(op="hadamard", place=place, moved=nbytes(x, y), copies=True)
    return bench.rows(work, bench.alternate(candidates))
