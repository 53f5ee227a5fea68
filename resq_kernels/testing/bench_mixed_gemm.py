"""mixed_gemm beside what a user would run instead: F.linear in FP32 and BF16, torch's int4 weights.

Every result is compared with the reference before it is timed. Weights are cold: each candidate
rotates over copies of more than --cold-mb megabytes. The floor of a row is the larger of
bytes / measured bandwidth and products / measured rate of the integer instructions;
ceiling_share = floor / time.

    resq bench gemm --shapes square,llama-3-8b --batch 1,16,512 --json out.json
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional

from resq_kernels import formats, ops, reference
from resq_kernels.testing import timing

# name -> (layer, N, K, K_hi); merged q/k/v and gate/up, down_proj is 4-bit alone.
SHAPES = {
    "square": [("square", 4096, 4096, 512)],
    "llama-3.2-1b": [
        ("qkv", 3072, 2048, 256),
        ("o", 2048, 2048, 256),
        ("gate_up", 16384, 2048, 256),
        ("down", 2048, 8192, 0),
    ],
    "llama-3-8b": [
        ("qkv", 6144, 4096, 512),
        ("o", 4096, 4096, 512),
        ("gate_up", 28672, 4096, 512),
        ("down", 4096, 14336, 0),
    ],
    "qwen2.5-7b": [
        ("qkv", 4608, 3584, 448),
        ("o", 3584, 3584, 448),
        ("gate_up", 37888, 3584, 448),
        ("down", 3584, 18944, 0),
    ],
}
CHECKED_ROWS = 64  # the reference works in float64; rows of a large batch are sampled
INT4_GROUP = 128


def integer_rate(threads: int) -> float | None:
    """Products a second of all threads together.

    None where only the portable code runs, or where there is no compiler to build the measurement.
    """
    isa, compiler = torch.ops.resq.cpu_isa(), os.environ.get("CXX", "g++")
    if isa == "scalar" or shutil.which(compiler) is None:
        return None
    source = Path(__file__).with_name("int_rate.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "int_rate.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o"]
        subprocess.run([*command, str(library)], check=True)
        rate = getattr(ctypes.CDLL(str(library)), f"resq_rate_{isa}")
        rate.restype = ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:
            runs = [sum(pool.map(lambda _: rate(), range(threads))) for _ in range(5)]
        return max(runs)


def copies(tensor: torch.Tensor, cold_bytes: int) -> list[torch.Tensor]:
    """`tensor` and enough clones of it that a round trip leaves nothing in the caches."""
    count = 1 + cold_bytes // (tensor.numel() * tensor.element_size())
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def random_operands(m: int, n: int, k_lo: int, k_hi: int) -> tuple[list, list]:
    """Quantized activations (q_lo, q_hi, params) and canonical weight (lo, hi, scale)."""
    x = torch.randn(m, k_lo + k_hi)
    weight = [
        torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8),
        torch.randint(-128, 128, (n, k_hi), dtype=torch.int8),
        torch.rand(n, 2) + 0.5,
    ]
    return list(ops.mixed_quantize(x, k_hi)), weight


def check(y: torch.Tensor, activation: list, weight: list) -> bool:
    """Bit equality with the reference on at most CHECKED_ROWS evenly spaced rows."""
    rows = torch.linspace(0, len(y) - 1, min(len(y), CHECKED_ROWS)).long()
    sampled = [tensor[rows] for tensor in activation]
    return torch.equal(y[rows], reference.mixed_gemm(*sampled, *weight, None, y.dtype))


def baselines(m: int, n: int, k: int, cold_bytes: int) -> dict[str, Callable[[int], object]]:
    """What a user would run instead, each over its own cold copies."""
    x = torch.randn(m, k)
    w = torch.randn(n, k)
    x16 = x.bfloat16()
    fp32, bf16 = copies(w, cold_bytes), copies(w.bfloat16(), cold_bytes)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    int4 = copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), cold_bytes)
    scales = torch.rand(k // INT4_GROUP, n, 2).bfloat16()
    int4_mm = torch.ops.aten._weight_int4pack_mm_for_cpu
    return {
        "F.linear fp32": lambda i: functional.linear(x, fp32[i % len(fp32)]),
        "F.linear bf16": lambda i: functional.linear(x16, bf16[i % len(bf16)]),
        "torch int4 g128": lambda i: int4_mm(x16, int4[i % len(int4)], INT4_GROUP, scales),
    }


def bench(
    layer: tuple[str, int, int, int], m: int, limits: dict, args: argparse.Namespace
) -> list[dict[str, object]]:
    """One row per baseline for one layer and batch."""
    cold_bytes = args.cold_mb * 2**20
    name, n, k, k_hi = layer
    activation, weight = random_operands(m, n, k - k_hi, k_hi)
    packed = ops.pack_weight(*weight[:2])
    sums = formats.weight_sums(*weight[:2])
    packs = copies(packed, cold_bytes)

    def ours(i: int) -> torch.Tensor:
        chosen = packs[i % len(packs)]
        return ops.mixed_gemm(*activation, chosen, weight[2], sums, None, torch.bfloat16)

    if not check(ours(0), activation, weight):
        raise RuntimeError(f"mixed_gemm: {name} {m}x{n}x{k}: differs from the reference")
    others = baselines(m, n, k, cold_bytes)
    times = timing.alternate(
        {"ours": ours, **others}, args.rounds, clock=timing.clock_of(args.cpu_time)
    )
    moved = packed.numel() + 16 * n + m * (k + 16 + 2 * n)
    bytes_floor = moved / limits["read_bytes_per_second"] * 1e6
    rate = limits["integer_products_per_second"]
    products_floor = m * n * k / rate * 1e6 if rate else None
    floor = max(bytes_floor, products_floor or 0.0)
    mine = times["ours"]
    return [
        {
            "op": "mixed_gemm",
            "layer": name,
            "shape": [m, n, k],
            "k_hi": k_hi,
            **timing.against(mine, baseline, times[baseline]),
            "bytes_floor_us": round(bytes_floor, 1),
            "products_floor_us": products_floor and round(products_floor, 1),
            "ceiling_share": round(floor / mine.median_us, 3),
            "checked": True,
        }
        for baseline in others
    ]


def print_row(row: dict[str, object]) -> None:
    """One line of the table; the last ratio is that of the fastest calls."""
    m, n, k = row["shape"]
    floor = max(row["bytes_floor_us"], row["products_floor_us"] or 0.0)
    best = row["baseline_best_us"] / row["ours_best_us"]
    print(
        f"{row['layer']:8}{m:5}{n:7}{k:7}{floor:9.0f}{row['ours_us']:9.0f}"
        f"{row['ceiling_share']:7.0%}  {row['baseline']:15}{row['baseline_us']:10.0f}"
        f"{row['ratio']:7.2f}{best:7.2f}",
        flush=True,
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Checks, times and prints every row.

    Args:
        args: the options of `resq bench`.

    Returns:
        machine, limits and rows, as docs/cli.md lists them.

    Raises:
        RuntimeError: a result differs from the reference.
    """
    torch.manual_seed(0)
    rate = integer_rate(torch.get_num_threads())
    limits = {
        "read_bytes_per_second": timing.read_bandwidth(clock=timing.clock_of(args.cpu_time)),
        "integer_products_per_second": rate,
    }
    print(f"memory {limits['read_bytes_per_second'] / 1e9:.1f} GB/s", end=", ")
    print(f"{rate / 1e9:.0f} G products/s" if rate else "no rate of products: see docs/cli.md")
    print(
        "layer       M      N      K floor us  ours us  share  baseline  us, ratio, ratio of best"
    )
    rows: list[dict[str, object]] = []
    for model in args.shapes or ["square"]:
        for layer in SHAPES[model]:
            for m in args.batch or [1, 4, 16, 64, 512]:
                for row in bench(layer, m, limits, args):
                    rows.append({"model": model, **row})
                    print_row(row)
    return {"machine": timing.machine(args.cpu_time), "limits": limits, "rows": rows}
