"""Round-to-nearest weight quantization with a searched clipping range; shared by nn and ptq."""

from __future__ import annotations

import torch

from resq_kernels.formats import QuantizedWeight, pack_int4

# The grid of the GPTQ, QuaRot and ResQ code: 80 ranges, 1 % apart, compared by the 2.4-norm.
CLIP_STEPS = 80
CLIP_STEP = 0.01
CLIP_NORM = 2.4
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 16, 1 << 24
"""Weights that are searched at once: on a CPU they and the temporaries of a step stay in the cache;
on a GPU a launch costs more than reading them."""
BOUND_STEPS, BOUND_WEIGHTS = 4, 32
"""Steps between two looks at the errors of the largest weights of every row, and how many."""


def search_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The symmetric scale of every row with the smallest rounding error.

    Formula: scale = min over shrink in {1.00, 0.99, ..., 0.21} of
    sum_k |w_k - s * clamp(rint(w_k / s))|^2.4 with s = shrink * max|w| / (2^(bits-1) - 1); the
    largest range wins a tie.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.

    Returns:
        float32 [N]; 1 where a row is zero everywhere, 0 if K = 0.

    Source: arXiv 2412.14363, whose code searches the range as GPTQ's and QuaRot's do.
    """
    if weight.numel() == 0:
        return weight.new_zeros(weight.shape[0])
    elements = CPU_ELEMENTS if weight.device.type == "cpu" else GPU_ELEMENTS
    parts = weight.split(max(1, elements // weight.shape[1]))
    return torch.cat([_search_rows(part, bits) for part in parts])


def _search_rows(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`search_scale` of a few rows; leaves out small ranges that cannot be the best of any row."""
    half: int = 2 ** (bits - 1)
    amax = weight.abs().amax(1)
    amax = torch.where(amax > 0, amax, half - 1.0)
    # A weight whose quotient by the largest code of its sign exceeds the scale by d is clipped, and
    # its error is at least d * (half - 1). The share taken off is for rounding.
    quotients = torch.maximum(weight / (half - 1), weight / -half) * (1 - 1e-5)
    quotients = quotients.topk(min(BOUND_WEIGHTS, weight.shape[1])).values
    best_error = torch.full_like(amax, torch.inf)
    best_scale = amax / (half - 1)
    for step in range(CLIP_STEPS):
        scale = amax * (1 - CLIP_STEP * step) / (half - 1)
        if step % BOUND_STEPS == 0:
            clipped = (quotients - scale[:, None]).clamp_min_(0).mul_(half - 1)
            # This error only grows as the range shrinks.
            if (clipped.pow_(CLIP_NORM).sum(1) > best_error).all():
                break
        rounded = torch.round(weight / scale[:, None]).clamp_(-half, half - 1)
        error = rounded.mul_(scale[:, None]).sub_(weight).square_().pow_(CLIP_NORM / 2).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def round_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """clamp(rint(w / scale)), signed codes int8 [N, K], of a weight [N, K] and a scale [N]."""
    half = 2 ** (bits - 1)
    # A part without columns has scale 0 and no code to compute.
    return torch.round(weight / scale[:, None]).clamp(-half, half - 1).to(torch.int8)


def quantize_weight(weight: torch.Tensor, high_columns: int) -> QuantizedWeight:
    """Rounds a weight to nearest: the last `high_columns` columns to INT8, the others to INT4.

    Args:
        weight: floating [N, K]; K - high_columns is even.
        high_columns: K_hi.

    Raises:
        ValueError: the weight is not a finite matrix, or the split is impossible.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_weight: weight: expected a floating matrix [N, K], got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    k_lo = weight.shape[1] - high_columns
    if high_columns < 0 or k_lo < 0 or k_lo % 2:
        raise ValueError(
            f"quantize_weight: high_columns: expected a number that leaves an even number of the "
            f"{weight.shape[1]} columns for INT4, got {high_columns}"
        )
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError("quantize_weight: weight: expected finite values, got NaN or infinity")
    parts = [(weight[:, :k_lo], 4), (weight[:, k_lo:], 8)]
    scale = torch.stack([search_scale(part, bits) for part, bits in parts], dim=1)
    lo, hi = (round_weight(part, scale[:, p], bits) for p, (part, bits) in enumerate(parts))
    return QuantizedWeight(pack_int4(lo), hi, scale)
