"""The linear layer: mixed 4/8-bit activations times a packed mixed 4/8-bit weight."""

from __future__ import annotations

import torch

from resq_kernels import _library


def mixed_gemm(
    q_lo: torch.Tensor,
    q_hi: torch.Tensor,
    params: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Exact integer products, then a float32 epilogue in one fixed order.

    Formula: d_p[m, n] = sum_k q_p[m, k] w_p[n, k] - zero_p[m] wsum_p[n], exact, p = lo, hi;
    y = ((d_lo * s_lo[m]) * t_lo[n] + (d_hi * s_hi[m]) * t_hi[n]) + bias[n], each operation rounded
    to float32 on its own; a part without columns is skipped. The result has the same bits for
    every batch size, thread count and instruction set (docs/formats.md section 4).

    Args:
        q_lo: uint8 [..., K_lo / 2] (packed 4-bit codes, even column in the low nibble) or int8
            [..., K_lo] (one code a byte, 4 or 8 bits); K_lo is even and at most 65536.
        q_hi: int8 [..., K_hi], K_hi at most 65536 (the sums of a part are exact in 32 bits).
        params: float32 [..., 4] = (s_lo, zero_lo, s_hi, zero_hi); zeros are integers of magnitude
            at most 255.
        packed_weight: uint8, one dimension, as `pack_weight` returned it for N, K_lo, K_hi.
        weight_scale: float32 [N, 2] = (t_lo, t_hi).
        weight_sum: int32 [N, 2], `formats.weight_sums` of the canonical codes.
        bias: float32, float16 or bfloat16 [N], or None.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        out_dtype [..., N]; a row whose scale is NaN is NaN.

    Raises:
        RuntimeError: a dtype, shape or device differs from the above, a tensor is not contiguous,
            there are 2^31 rows or more of activations or of the weight, or the size of
            `packed_weight` is not the one for N, K_lo and K_hi.

    Source: arXiv 2412.14363 section 4 (x W as the sum of its 4-bit and 8-bit parts).
    """
    y: torch.Tensor = _library.call(
        torch.ops.resq.mixed_gemm.default,
        q_lo,
        q_hi,
        params,
        packed_weight,
        weight_scale,
        weight_sum,
        bias,
        out_dtype,
    )
    return y


@_library.register_fake("mixed_gemm")
def _fake(
    q_lo: torch.Tensor,
    q_hi: torch.Tensor,
    params: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return q_lo.new_empty((*q_lo.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)
