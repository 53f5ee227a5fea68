"""Checks of MixedTensors that several test files share."""

from __future__ import annotations

import torch

from resq_kernels.formats import MixedTensor, unpack_int4
from resq_kernels.reference.ops import MIN_SCALE

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = 2.0**-24  # one rounding to float32, relative


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaN equals NaN, -0 differs from 0)."""
    views = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    view = views.get(a.dtype, a.dtype)
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def assert_same_mixed(actual: MixedTensor, expected: MixedTensor) -> None:
    """Bit for bit, each tensor contiguous."""
    for name, a, b in zip(MixedTensor._fields, actual, expected, strict=True):
        assert a.is_contiguous(), name
        assert bits_equal(a, b), f"{name}: {a} instead of {b}"


def assert_quantizes(
    actual: MixedTensor, exact: torch.Tensor, bound: torch.Tensor, lo_bits: int = 4
) -> None:
    """Asserts that `actual` is the asymmetric quantization, clip 1, of a float32 evaluation.

    Args:
        exact: the unquantized rows in float64 [..., K].
        bound: float64, broadcastable to `exact`: how far float32 may have been from `exact`.

    Every value must be within half a step of its code, and every scale must be that of the exact
    range, both up to `bound` and the roundings of the quantizer itself (four of them).
    """
    q_lo = unpack_int4(actual.q_lo) if actual.q_lo.dtype == torch.uint8 else actual.q_lo
    bound = bound.expand_as(exact)
    k_lo = q_lo.shape[-1]
    parts = [(q_lo, slice(0, k_lo), lo_bits), (actual.q_hi, slice(k_lo, None), 8)]
    for part, (codes, columns, bits) in enumerate(parts):
        if codes.shape[-1] == 0:
            continue
        y, delta = exact[..., columns], bound[..., columns]
        scale = actual.params[..., 2 * part].double()
        zero = actual.params[..., 2 * part + 1].double().unsqueeze(-1)
        span = y.amax(-1).clamp_min(0) - y.amin(-1).clamp_max(0)
        span = torch.where(span == 0, 2.0, span)  # a row of zeros gets the range [-1, 1]
        worst = delta.amax(-1)
        error = (scale - (span / (2**bits - 1)).clamp_min(MIN_SCALE)).abs()
        allowed = (2 * worst + 4 * UNIT * span) / (2**bits - 1)
        assert (error <= allowed).all(), f"scale of part {part}: off by {error.max():.3g}"
        step = scale.unsqueeze(-1)
        error = (step * (codes.double() - zero) - y).abs()
        allowed = 0.5 * step + delta + 4 * UNIT * span.unsqueeze(-1)
        assert (error <= allowed).all(), f"codes of part {part}: off by {(error / step).max():.4f}"
