"""kv_attention: causal attention over the pages of the 4-bit cache."""

from __future__ import annotations

import torch

from resq_kernels import _library


def kv_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    head_dim_hi: int | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of all sequences over 4-bit pages: prefill, chunked prefill
    and decode.

    Formula: out = softmax(scale q K^T) V over the visible tokens, with K and V as
    dequantized and a float32 softmax. CPUs: q as 16-bit integers per part of the row, exact integer
    dot products. CUDA: products of float16 with float32 sums (docs/cuda.md).
    Query i of a sequence with n queries sees the first seq_len - n + i + 1 tokens (bottom-right
    aligned). Blocks of keys have a fixed size and order, so the result of a query does not depend
    on the batch, on chunking, on the page size, on the thread count or on the instruction set.

    Args:
        q: float32, float16 or bfloat16 [T, n_q_heads, D], the queries of all sequences, one after
            the other, in the basis of the keys: after RoPE and the key rotation, as `kv_append`
            returns them. n_q_heads is a multiple of the cache's heads; D = 64 or 128. Each token is
            contiguous; tokens may be strided, as in a slice of a wider projection (on CUDA by a
            multiple of 16 bytes).
        cache: uint8 [num_pages, n_kv_heads, page_size * token_bytes], holding the new tokens too.
        block_table: int32 [S, max_pages]; entries beyond a sequence's length are not read.
        seq_lens: int32 [S], tokens of each sequence including the new ones.
        query_starts: int32 [S + 1], first query of each sequence, and the end of the last one;
            the result is zero for rows of q beyond it.
        scale: factor on the scores, usually D ** -0.5.
        out_dtype: float32, float16 or bfloat16; None for q's.
        head_dim_hi: None, or 0 to D for a result in the column order of o_proj's input: first the
            D - head_dim_hi low dims of every head, then the last head_dim_hi dims of every head
            (docs/formats.md section 6).

    Returns:
        [T, n_q_heads, D] in out_dtype, [T, n_q_heads * D] with head_dim_hi; zeros for queries that
        see no token; NaN where a visible row or the query holds NaN.

    Raises:
        RuntimeError: a shape or dtype is not as above, on CPUs also a length or page; nothing is
            computed. On CUDA lengths and pages are not read on the host: a wrong one traps.

    Source: arXiv 2412.14363, section 4; docs/formats.md section 5.
    """
    out: torch.Tensor = _library.call(
        torch.ops.resq.kv_attention.default,
        q,
        cache,
        block_table,
        seq_lens,
        query_starts,
        scale,
        out_dtype,
        head_dim_hi,
    )
    return out


@_library.register_fake("kv_attention")
def _fake(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    head_dim_hi: int | None = None,
) -> torch.Tensor:
    torch._check(q.dim() == 3, lambda: f"kv_attention: q: expected 3 dimensions, got {q.dim()}")
    shape = q.shape if head_dim_hi is None else (q.shape[0], q.shape[1] * q.shape[2])
    return q.new_empty(shape, dtype=out_dtype)
