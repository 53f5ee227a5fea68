"""Every CUDA kernel beside cuBLAS BF16 or its floor, in one run; results are checked first.

python -m resq_kernels.testing.bench_cuda --models llama-3-8b --json out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from resq_kernels import formats, kv_pages, ops
from resq_kernels.testing import bench_cuda_attention, cuda_timing
from resq_kernels.testing.bench_kv_attention import HEADS
from resq_kernels.testing.bench_mixed_gemm import SHAPES

CHECKED_ROWS = 5  # compared with the CPU's operator; rows do not depend on the batch
Row = dict[str, object]


class Limits:
    """What the device can do: bytes and 8-bit operations a second."""

    def __init__(self, ceiling_source: Path | None) -> None:
        self.bandwidth = cuda_timing.copy_bandwidth()
        self.int8 = cuda_timing.int8_rate(ceiling_source) if ceiling_source else None

    def floor_us(self, moved: float, operations: float = 0.0) -> float:
        """The least time that moving and multiplying could take."""
        seconds = moved / self.bandwidth
        return 1e6 * max(seconds, operations / self.int8 if self.int8 else 0.0)


def bench_gemm(
    layer: str, n: int, k: int, k_hi: int, batches: list[int], limits: Limits
) -> list[Row]:
    """mixed_gemm beside F.linear in BF16 for one layer."""
    k_lo = k - k_hi
    weight_bytes = formats.packed_weight_bytes(n, k_lo, k_hi, "cuda")
    ours, baseline = cuda_timing.copies(weight_bytes), cuda_timing.copies(2 * n * k)
    codes_lo = torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8)
    codes_hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
    scale, sums = torch.rand(n, 2) * 0.01, formats.weight_sums(codes_lo, codes_hi)
    packed_cpu = ops.pack_weight(codes_lo, codes_hi)
    packed = ops.pack_weight(codes_lo.cuda(), codes_hi.cuda())
    weights = [packed.clone() for _ in range(ours)]
    scale_cuda, sums_cuda = scale.cuda(), sums.cuda()
    linears = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(baseline)]
    rows = []
    for m in batches:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        mixed = ops.mixed_quantize(x, k_hi)

        def gemm(i: int, mixed: formats.MixedTensor = mixed) -> torch.Tensor:
            weight = weights[i % ours]
            return ops.mixed_gemm(*mixed, weight, scale_cuda, sums_cuda, None, torch.bfloat16)

        picked = torch.randperm(m)[:CHECKED_ROWS]
        sample = [part.cpu()[picked].contiguous() for part in mixed]
        expected = ops.mixed_gemm(*sample, packed_cpu, scale, sums, None, torch.bfloat16)
        if not torch.equal(gemm(0).cpu()[picked], expected):
            raise RuntimeError(f"mixed_gemm {layer} M={m}: the result is not that of the CPU")
        times = cuda_timing.alternate(
            {"resq": gemm, "bf16": lambda i, x=x: functional.linear(x, linears[i % baseline])}
        )
        moved = weight_bytes + 16 * n + sum(p.numel() * p.element_size() for p in mixed) + 2 * m * n
        packed_form = mixed.q_lo.dtype == torch.uint8
        kernel = torch.ops.resq.mixed_gemm_kernel(m, n, k_lo, k_hi, packed_form, 0)
        floor = limits.floor_us(moved, 2.0 * m * n * k)
        rows.append(_row("mixed_gemm", layer, [m, n, k], kernel, times, floor))
    return rows


def bench_quantizers(hidden: int, wide: int, batches: list[int], limits: Limits) -> list[Row]:
    """The quantizing operators and the transform of one model; floor: bytes alone."""
    rows, high = [], hidden // 8

    def rotating(*shape: int) -> Callable[[int], torch.Tensor]:
        count = cuda_timing.copies(2 * shape[0] * shape[1])
        data = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        return lambda i: data[i % count]

    for m in batches:
        x, gate_up = rotating(m, hidden), rotating(m, 2 * wide)

        # name, shape, operator, its data, bytes an element: 16-bit values read and written once, a
        # byte for each code at most
        benches: list[tuple[str, list[int], Callable, Callable[[int], torch.Tensor], int]] = [
            ("mixed_quantize", [m, hidden], partial(ops.mixed_quantize, n_hi=high), x, 3),
            ("rms_norm_quantize", [m, hidden], partial(_norm, high), x, 5),
            ("silu_mul_hadamard_quantize", [m, wide], ops.silu_mul_hadamard_quantize, gate_up, 5),
            ("hadamard", [2 * m, wide], partial(_transform, wide), gate_up, 4),
        ]
        for op, shape, operator, data, bytes_an_element in benches:
            _check(op, operator(data(0)), operator(data(0)[:CHECKED_ROWS].cpu()))
            times = cuda_timing.alternate({"resq": lambda i, f=operator, d=data: f(d(i))})
            floor = limits.floor_us(shape[0] * shape[1] * bytes_an_element)
            rows.append(_row(op, "", shape, "", times, floor))
    return rows


def bench_attention(model: str, limits: Limits) -> list[Row]:
    """A decode step of kv_attention beside torch's attention on a BF16 cache; floor: the cache."""
    rows, (_, n_kv, head_dim) = [], HEADS[model]
    for batch, context in bench_cuda_attention.CELLS:
        times = bench_cuda_attention.times(HEADS[model], batch, context)
        floor = limits.floor_us(batch * context * n_kv * kv_pages.token_bytes(head_dim))
        shape = [batch, context, *HEADS[model]]
        rows.append(_row("kv_attention", model, shape, "", times, floor))
        rows[-1]["baseline"] = "attention bf16"
    return rows


def _norm(high: int, x: torch.Tensor) -> formats.MixedTensor:
    return ops.rms_norm_quantize(x, x, None, 1e-5, high)[0]


def _transform(wide: int, x: torch.Tensor) -> torch.Tensor:
    return ops.hadamard(x.view(-1, wide))


def _check(op: str, ours: object, expected: object) -> None:
    """Codes of the first rows are within one of the CPU's, values within 2^-6 of their norm."""
    if isinstance(expected, torch.Tensor):
        got = ours.cpu()[: len(expected)].double()
        good = (got - expected.double()).norm() <= 2**-6 * expected.double().norm()
    else:
        k_lo = expected.q_lo.shape[-1]
        got = ours.q_lo.cpu()[: len(expected.q_lo)]
        if got.dtype == torch.uint8:
            got = formats.unpack_int4(got)
        difference = (got.double() - expected.q_lo.double()).abs()
        good = difference.max() <= 1 and (difference != 0).double().mean() <= 0.01
        good &= got.shape[-1] == k_lo
    if not good:
        raise RuntimeError(f"{op}: the result is not that of the CPU")


def _row(op: str, layer: str, shape: list[int], kernel: str, times: dict, floor_us: float) -> Row:
    ours = times["resq"].median_us
    row: Row = {"op": op, "layer": layer, "shape": shape, "kernel": kernel}
    row |= {"ours_us": round(ours, 2), "floor_us": round(floor_us, 2)}
    row |= {"ceiling_share": round(floor_us / ours, 3), "checked": True}
    if "bf16" in times:
        bf16 = times["bf16"].median_us
        row |= {"baseline": "F.linear bf16", "baseline_us": round(bf16, 2)}
        row |= {"ratio": round(bf16 / ours, 2)}
    return row


def markdown(figures: dict) -> str:
    """The rows as a Markdown table."""
    names = ("op", "layer", "shape", "kernel", "ours_us", "floor_us", "ceiling_share")
    names += ("baseline", "baseline_us", "ratio")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += [
        "| " + " | ".join(str(row.get(n, "")) for n in names) + " |" for row in figures["rows"]
    ]
    return "\n".join(lines)


def run(models: list[str], batches: list[int], ceiling_source: Path | None) -> dict[str, object]:
    """All rows of all models.

    Raises:
        RuntimeError: a result differs from the CPU's.
    """
    limits = Limits(ceiling_source)
    figures: dict[str, object] = {
        "device": cuda_timing.device(),
        "copy_bytes_per_second": limits.bandwidth,
        "int8_operations_per_second": limits.int8,
        "rows": [],
    }
    for model in models:
        layers = {layer: (n, k, k_hi) for layer, n, k, k_hi in SHAPES[model]}
        for layer, shape in layers.items():
            figures["rows"] += bench_gemm(f"{model} {layer}", *shape, batches, limits)
        hidden, wide = layers["o"][1], layers["down"][1]
        figures["rows"] += bench_quantizers(hidden, wide, batches, limits)
        if model in HEADS:
            figures["rows"] += bench_attention(model, limits)
    figures["device_after"] = cuda_timing.device()
    return figures


def main() -> None:
    """Prints the table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3-8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batch", default="1,16,64,128,256,2048")
    parser.add_argument("--ceiling", type=Path, help="benchmarks/cuda/int8_ceiling.cu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    batches = [int(m) for m in arguments.batch.split(",")]
    figures = run(arguments.models.split(","), batches, arguments.ceiling)
    print(markdown(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
