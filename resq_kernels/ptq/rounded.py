"""A rounded weight: codes and scales of both parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq_kernels.formats import pack_int4, unpack_int4
from resq_kernels.weights import quantize_weight


@dataclass(frozen=True)
class RoundedWeight:
    """w = scale * code, per output row and part.

    Attributes:
        codes_lo: int8 [N, K_lo], values in [-8, 7].
        codes_hi: int8 [N, K_hi].
        scale: float32 [N, 2], (low part, high part).
    """

    codes_lo: torch.Tensor
    codes_hi: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K_lo + K_hi]."""
        parts = (self.codes_lo, self.codes_hi)
        return torch.cat([self.scale[:, p, None] * codes for p, codes in enumerate(parts)], dim=1)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The canonical tensors of docs/formats.md section 3.1, named for a linear."""
        return {
            f"{name}.weight_lo": pack_int4(self.codes_lo),
            f"{name}.weight_hi": self.codes_hi.contiguous(),
            f"{name}.weight_scale": self.scale.contiguous(),
        }


def round_to_nearest(weight: torch.Tensor, k_hi: int) -> RoundedWeight:
    """Every weight to its nearest code, ranges searched by `weights.search_scale`."""
    weight_lo, weight_hi, scale = quantize_weight(weight, k_hi)
    return RoundedWeight(unpack_int4(weight_lo), weight_hi, scale)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moment: torch.Tensor) -> float:
    """||(W - W') x|| / ||W x|| over the calibration inputs x with moment E[x x^T].

    Formula: sqrt(tr(D M D^T) / tr(W M W^T)), D = W - W'; 0 where W x is 0 everywhere.
    """

    def power(matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix.double()
        return ((matrix @ moment) * matrix).sum()

    total = power(weight)
    return float((power(weight - rounded) / total).clamp_min(0).sqrt()) if total > 0 else 0.0
