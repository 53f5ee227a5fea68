"""One mixed_gemm at each of four batch sizes, for ncu to profile (the step `profile`)."""

from __future__ import annotations

import torch

from resq_kernels import ops
from resq_kernels.bench import gemm, models
from resq_kernels.formats import PackedWeight

MODEL, LAYER, ROWS = "llama-3-8b", "gate_up", (1, 64, 128, 2048)


def main() -> None:
    """Runs and checks the calls."""
    _, n, k, k_hi = next(layer for layer in models.layers(MODEL) if layer[0] == LAYER)
    weight = gemm.random_weight(n, k - k_hi, k_hi, "cuda")
    data, scale, sums, _, _ = PackedWeight.pack(weight)
    activations = [
        ops.mixed_quantize(torch.randn(m, k, device="cuda", dtype=gemm.OUT), k_hi) for m in ROWS
    ]
    results = [ops.mixed_gemm(*x, data, scale, sums, None, gemm.OUT) for x in activations]
    torch.cuda.synchronize()
    if wrong := gemm.differing(results, activations, weight):
        raise RuntimeError(f"mixed_gemm: {wrong[0]} rows: differs from the reference")
    for m, x in zip(ROWS, activations, strict=True):
        packed = x.q_lo.dtype == torch.uint8
        kernel = torch.ops.resq.mixed_gemm_kernel(m, n, k - k_hi, k_hi, packed, 0)
        print(f"M = {m}: {kernel}")
    print(f"{len(ROWS)} calls of mixed_gemm, {LAYER} of {MODEL}: right")


if __name__ == "__main__":
    main()
