"""mixed_gemm compared with what a user would run instead (gemm_baselines.py).

Every result is compared with the reference, bit for bit, before it is timed. Weights are cold:
each candidate rotates over copies of them. The bound of a row is the larger of bytes / measured
bandwidth and products / measured rate of the integer instructions.

    resq bench gemm --shapes square,llama-3-8b --batch 1,16,512 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from resq_kernels import ops, reference
from resq_kernels.bench import gemm_baselines, models
from resq_kernels.bench.device import BenchDevice, Call, Row, Work, evenly_spaced, nbytes
from resq_kernels.formats import MixedTensor, PackedWeight, QuantizedWeight

MODELS = (models.SQUARE, *models.names())
DEFAULTS = {"shapes": [models.SQUARE], "batch": [1, 4, 16, 64, 512]}
OUT = torch.bfloat16


def random_weight(n: int, k_lo: int, k_hi: int, device: str) -> QuantizedWeight:
    """Random codes and scales."""
    return QuantizedWeight(
        torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8, device=device),
        torch.randint(-128, 128, (n, k_hi), dtype=torch.int8, device=device),
        torch.rand(n, 2, device=device) + 0.5,
    )


def differing(
    results: list[torch.Tensor],
    activations: list[MixedTensor],
    weight: QuantizedWeight,
) -> list[int]:
    """Batch sizes whose result differs from the reference in any bit of the rows looked at.

    Evenly spaced rows of each batch go through one call of the reference, which spends most of
    its time on the weight.
    """
    rows = [evenly_spaced(len(y)) for y in results]
    sampled = [
        torch.cat([part.cpu()[row] for part, row in zip(parts, rows, strict=True)])
        for parts in zip(*activations, strict=True)
    ]
    q_lo, q_hi, params = sampled
    codes_lo, codes_hi, scale = (part.cpu() for part in weight)
    expected = reference.mixed_gemm(q_lo, q_hi, params, codes_lo, codes_hi, scale, None, OUT)
    wanted = expected.split([len(row) for row in rows])
    return [
        len(y)
        for y, row, right in zip(results, rows, wanted, strict=True)
        if not torch.equal(y.cpu()[row], right)
    ]


def layer_rows(
    bench: BenchDevice,
    model: str,
    layer: tuple[str, int, int, int],
    batches: list[int],
    missing: dict[str, str],
) -> Iterator[Row]:
    """Checks one layer at all batch sizes, then times it at each."""
    name, n, k, k_hi = layer
    k_lo = k - k_hi
    weight = random_weight(n, k_lo, k_hi, bench.device)
    data, scale, sums, _, _ = PackedWeight.pack(weight)
    packs = bench.copies(data)
    activations = [
        ops.mixed_quantize(torch.randn(m, k, device=bench.device, dtype=OUT), k_hi) for m in batches
    ]

    def ours(activation: MixedTensor, i: int) -> torch.Tensor:
        return ops.mixed_gemm(*activation, packs[i % len(packs)], scale, sums, None, OUT)

    results = [ours(activation, 0) for activation in activations]
    if wrong := differing(results, activations, weight):
        size = f"{wrong[0]}x{n}x{k}"
        raise RuntimeError(f"mixed_gemm: {model} {name} {size}: differs from the reference")
    for m, activation, y in zip(batches, activations, results, strict=True):
        place: Row = {"model": model, "layer": name, "batch": m, "shape": [m, n, k], "k_hi": k_hi}
        if bench.on_gpu:
            packed = activation.q_lo.dtype == torch.uint8
            place["kernel"] = str(torch.ops.resq.mixed_gemm_kernel(m, n, k_lo, k_hi, packed, 0))
        candidates: dict[str, Call] = {"ours": partial(ours, activation)}
        candidates |= gemm_baselines.baselines(bench, m, n, k, missing)
        work = Work(
            op="mixed_gemm",
            place=place,
            moved=nbytes(packs[0], sums, scale, activation, y),
            products=m * n * k,
        )
        yield from bench.rows(work, bench.alternate(candidates))


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, layer, batch and baseline.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch.
        missing: receives name -> reason for each baseline that cannot run.
    """
    for model in args.shapes:
        for layer in models.layers(model):
            yield from bench.attempted(
                partial(layer_rows, bench, model, layer, args.batch, missing)
            )
