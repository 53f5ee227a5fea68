"""What a user would run instead of mixed_gemm: every matrix product that torch offers, and
CUTLASS's mixed-input GEMM of 4-bit weights and 8-bit activations.

Each alternative is called once when it is set up; one that this torch or device does not support
is left out, and the reason is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from resq_kernels import formats
from resq_kernels.bench import cutlass_s4s8
from resq_kernels.bench.device import BenchDevice, Call

INT4_GROUP = 128
_FP8_MOST = 448.0  # the largest float8_e4m3fn


def baselines(
    bench: BenchDevice, m: int, n: int, k: int, missing: dict[str, str]
) -> dict[str, Call]:
    """name -> call, each over its own cold copies of random weights [n, k].

    Args:
        bench: the device.
        m, n, k: rows of the activations, rows of the weight, columns of both.
        missing: receives name -> reason for each alternative that cannot run.
    """
    x = torch.randn(m, k, device=bench.device)
    w = torch.randn(n, k, device=bench.device)
    return bench.available(_cuda(bench, x, w) if bench.on_gpu else _cpu(bench, x, w), missing)


def _cpu(
    bench: BenchDevice, x: torch.Tensor, w: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Call]]]:
    yield "F.linear fp32", lambda: _linear(bench, x, w)
    yield "F.linear bf16", lambda: _linear(bench, x.bfloat16(), w.bfloat16())
    yield f"torch int4 g{INT4_GROUP}", lambda: _int4_cpu(bench, x, w)


def _cuda(
    bench: BenchDevice, x: torch.Tensor, w: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Call]]]:
    yield "F.linear bf16", lambda: _linear(bench, x.bfloat16(), w.bfloat16())
    yield "F.linear fp16", lambda: _linear(bench, x.half(), w.half())
    yield "torch._scaled_mm fp8", lambda: _fp8(bench, x, w)
    yield "torch._int_mm", lambda: _int8(bench, x, w)
    yield f"torch int4 g{INT4_GROUP}", lambda: _int4_cuda(bench, x, w)
    yield "CUTLASS s4 x s8", lambda: _cutlass_s4s8(bench, x, w)


def _linear(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    weights = bench.copies(w)
    return lambda i: functional.linear(x, weights[i % len(weights)])


def _fp8(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    """One scale per row on both sides, as inference stacks use it; quantizing x is not timed."""
    scale_x = x.abs().amax(1, keepdim=True) / _FP8_MOST
    scale_w = (w.abs().amax(1, keepdim=True) / _FP8_MOST).T.contiguous()
    x8 = (x / scale_x).to(torch.float8_e4m3fn)
    weights = bench.copies((w / scale_w.T).to(torch.float8_e4m3fn))
    return lambda i: torch._scaled_mm(
        x8, weights[i % len(weights)].T, scale_x, scale_w, out_dtype=torch.bfloat16
    )


def _int8(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    """The int32 product alone, without scales: less work than ours. torch wants over 16 rows."""
    if len(x) <= 16:
        raise ValueError(f"takes more than 16 rows, got {len(x)}")
    x8 = torch.randint(-128, 128, x.shape, dtype=torch.int8, device=x.device)
    w8 = torch.randint(-128, 128, w.shape, dtype=torch.int8, device=w.device)
    weights = bench.copies(w8)
    return lambda i: torch._int_mm(x8, weights[i % len(weights)].T)


def _int4_cpu(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    (n, k), x16 = w.shape, x.bfloat16()
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    weights = bench.copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
    scales, product = _int4_scales(w), torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda i: product(x16, weights[i % len(weights)], INT4_GROUP, scales)


def _int4_cuda(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    (n, k), x16 = w.shape, x.bfloat16()
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=w.device)
    weights = bench.copies(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
    scales, product = _int4_scales(w), torch.ops.aten._weight_int4pack_mm
    return lambda i: product(x16, weights[i % len(weights)], INT4_GROUP, scales)


def _int4_scales(w: torch.Tensor) -> torch.Tensor:
    n, k = w.shape
    if k % INT4_GROUP:
        raise ValueError(f"takes columns in groups of {INT4_GROUP}, got {k}")
    return torch.rand(k // INT4_GROUP, n, 2, device=w.device).bfloat16()


def _cutlass_s4s8(bench: BenchDevice, x: torch.Tensor, w: torch.Tensor) -> Call:
    """All columns in 4 bits, one scale per row on both sides, no zero points: less work than ours.

    Its result is checked here, before it is timed.
    """
    product = cutlass_s4s8.load()
    (n, k), m = w.shape, len(x)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=w.device)
    x8 = torch.randint(-128, 128, x.shape, dtype=torch.int8, device=x.device)
    scale, row_scale = (torch.rand(len(t), device=t.device) + 0.5 for t in (w, x))
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    workspace = product.workspace(m, n, k, x.device)
    y = product(packed, x8, scale, row_scale, out, workspace)
    cutlass_s4s8.check(y, formats.unpack_int4(packed), x8, scale, row_scale)
    weights = bench.copies(packed)
    return lambda i: product(weights[i % len(weights)], x8, scale, row_scale, out, workspace)
