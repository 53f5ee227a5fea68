"""embedding: rows of a packed weight as floats, the lookup in a quantized embedding."""

from __future__ import annotations

import torch

from resq_kernels import _library


def embedding(
    ids: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k_lo: int,
    k_hi: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a packed weight [N, K_lo + K_hi] as floats.

    Formula: y[..., k] = scale_p * code[ids[...], k] with the scale of the row and of k's part: one
    float32 product, rounded once more to float16 or bfloat16.

    Args:
        ids: int32 or int64 of any shape, each 0 to N - 1; the raw operator takes int64.
        packed_weight: uint8, one dimension, as `pack_weight` returned it on this kind of device:
            the tensor that `mixed_gemm` reads, so that a tied head needs no second copy.
        weight_scale: float32 [N, 2].
        k_lo: 4-bit columns, even.
        k_hi: 8-bit columns.
        dtype: float32, float16 or bfloat16.

    Returns:
        dtype [..., K_lo + K_hi].

    Raises:
        RuntimeError: a shape or dtype is not as above, or an id is out of range. On CUDA ids are
            not read on the host: an invalid one traps in the kernel (a device error).

    Source: docs/formats.md sections 3 and 6.
    """
    if ids.dtype == torch.int32:
        ids = ids.long()
    y: torch.Tensor = _library.call(
        torch.ops.resq.embedding.default, ids, packed_weight, weight_scale, k_lo, k_hi, dtype
    )
    return y


@_library.register_fake("embedding")
def _fake(
    ids: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    k_lo: int,
    k_hi: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return packed_weight.new_empty((*ids.shape, k_lo + k_hi), dtype=dtype)
