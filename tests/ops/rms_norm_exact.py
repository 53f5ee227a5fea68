"""The float64 evaluation of rms_norm_quantize and its bound, for the tests of every device."""

from __future__ import annotations

import torch
from mixed_check import UNIT

EPS = 1e-5


def exact_rows(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float = EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized rows in float64, and how far float32 may be from them.

    The sum of squares has 1024 partial sums: K / 1024 additions in each, ten to join them, and the
    squares' own rounding, all of positive terms; the root halves that. Then the division by K, the
    sum with eps, the root, its inverse and the products with x and weight round once each.
    """
    h = (x if residual is None else x + residual).double()
    y = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.double()
    roundings = (x.shape[-1] / 1024 + 1 + 10 + 1) / 2 + 6
    return y, roundings * UNIT * y.abs()
