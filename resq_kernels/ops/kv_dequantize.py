"""kv_dequantize: keys and values as floats, from the pages of the 4-bit cache."""

from __future__ import annotations

import torch

from resq_kernels import _library


def kv_dequantize(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantizes the paged keys and values of sequences, for an attention that reads floats.

    Formula: scale * code + offset in float32 (one rounding: the product is exact), rounded once
    more to float16 or bfloat16; float16 saturates at 65504, which the top code of a range may
    exceed by the rounding of its scale. A part stored as NaN is NaN.

    Args:
        cache: uint8 [num_pages, n_kv_heads, page_size * token_bytes] (`kv_append`).
        block_table: int32 [S, max_pages], the pages of every sequence; sequences may share pages,
            and entries past a sequence's length are not read.
        seq_lens: int32 [S], 0 to min(max_tokens, max_pages * page_size).
        max_tokens: rows of every sequence in the results.
        head_dim: D, 64 or 128.
        dtype: float32, float16 or bfloat16.

    Returns:
        k and v, dtype [S, max_tokens, n_kv_heads, D]; 0 past a sequence's length. Keys are in the
        rotated basis, as stored: scores need the rotated query.

    Raises:
        RuntimeError: a shape, dtype, length or page is not as above. On CUDA lengths and pages are
            not read on the host: an invalid one traps in the kernel (a device error).

    Source: arXiv 2412.14363, section 4 (mixed-precision cache); docs/formats.md section 5.
    """
    k, v = _library.call(
        torch.ops.resq.kv_dequantize.default,
        cache,
        block_table,
        seq_lens,
        max_tokens,
        head_dim,
        dtype,
    )
    return k, v


@_library.register_fake("kv_dequantize")
def _fake(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(
        cache.dim() == 3, lambda: f"kv_dequantize: cache: expected 3 dimensions, got {cache.dim()}"
    )
    shape = (block_table.shape[0], max_tokens, cache.shape[1], head_dim)
    return cache.new_empty(shape, dtype=dtype), cache.new_empty(shape, dtype=dtype)
