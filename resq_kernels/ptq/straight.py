"""Rounding with a gradient: straight through the codes."""

from __future__ import annotations

from typing import Any, cast

import torch

from resq_kernels import ops, reference
from resq_kernels.formats import RowFormat

Gradients = tuple[torch.Tensor | None, ...]


def round_rows(x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """What the codes of rows stand for; the gradient passes as if nothing were rounded.

    Args:
        x: float32 [..., K].
        row_format: how rows are rounded, codes unpacked.

    Source: the straight-through estimator, arXiv 1308.3432.
    """
    return cast(torch.Tensor, RoundRows.apply(x, row_format))  # type: ignore[no-untyped-call]


def round_cache(x: torch.Tensor, hi_bits: int) -> torch.Tensor:
    """What the cache returns of keys or values; the gradient likewise.

    Args:
        x: float32 [..., head_dim].
        hi_bits: of the high part, 8 or 4.
    """
    return cast(torch.Tensor, RoundCache.apply(x, hi_bits))  # type: ignore[no-untyped-call]


def round_in_basis(
    x: torch.Tensor, turn: torch.Tensor, matrix: torch.Tensor, row_format: RowFormat
) -> torch.Tensor:
    """x + e U^T, e the error of rounding x U: what a rotated model's linears make of x, seen in the
    source's basis.

    Formula: with e held as it is (straight through), a turn U (I + D), D skew-symmetric, gives
    x + e (I + D)^T U^T. Its gradient by D is h^T e, h = g U, g being the gradient by the output; a
    symmetric part is left out, in which no turn goes. The gradient by x is g.

    Args:
        x: float32 [..., K].
        turn: D, zeros [K, K], which gets the gradient in float32.
        matrix: U, [K, K], in the dtype of the products.
        row_format: how rows are rounded, codes unpacked.
    """
    args = x, turn, matrix, row_format
    return cast(torch.Tensor, RoundInBasis.apply(*args))  # type: ignore[no-untyped-call]


class RoundRows(torch.autograd.Function):
    """`round_rows`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
        return ops.mixed_quantize(x, *row_format).dequantize()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        return gradients[0], None


class RoundCache(torch.autograd.Function):
    """`round_cache`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, hi_bits: int) -> torch.Tensor:
        return reference.kv_fake_quantize(x, hi_bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        return gradients[0], None


class RoundInBasis(torch.autograd.Function):
    """`round_in_basis`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, turn: torch.Tensor, matrix: torch.Tensor, row_format: RowFormat
    ) -> torch.Tensor:
        turned = (x.to(matrix.dtype) @ matrix).float()
        error = (ops.mixed_quantize(turned, *row_format).dequantize() - turned).to(matrix.dtype)
        ctx.save_for_backward(error, matrix)
        return x + (error @ matrix.mT).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        error, matrix = ctx.saved_tensors
        (gradient,) = gradients
        turned = (gradient.to(matrix.dtype) @ matrix).flatten(0, -2)
        return gradient, (turned.mT @ error.flatten(0, -2)).float(), None, None
