"""Round-to-nearest weight quantization with a searched range; shared by nn and ptq."""

from __future__ import annotations

import torch

from resq_kernels.formats import QuantizedWeight, pack_int4
from resq_kernels.ops.search_scale import search_scale


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
