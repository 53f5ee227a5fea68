"""The float64 evaluation of both norms and its bound, for the tests of every device."""

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


def assert_normalizes(
    actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float = EPS
) -> None:
    """Asserts that `actual` is the float32 evaluation, rounded once to x's dtype."""
    exact, bound = exact_rows(x, None, weight, eps)
    kind = torch.finfo(x.dtype)
    # Half a step of the dtype, but of subnormal numbers; none in float32, where `bound` has it.
    last = 0.0 if x.dtype == torch.float32 else kind.eps / 2
    allowed = bound * (1 + last) + last * exact.abs() + kind.smallest_normal * kind.eps
    assert actual.dtype == x.dtype and actual.shape == x.shape
    assert ((actual.double() - exact).abs() <= allowed).all()
