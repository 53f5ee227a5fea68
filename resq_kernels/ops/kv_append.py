"""kv_append: quantized keys and values into the pages of the 4-bit cache."""

from __future__ import annotations

import torch

from resq_kernels import _library


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_rotation: torch.Tensor | None,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hi_bits: int = 8,
    q: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Applies RoPE and the key rotation to k, quantizes k and v per token and head, writes them
    into pages, and rotates the queries of the same tokens: all that a layer does to q, k and v
    before attention.

    Formula: k' = (k cos + rotate_half(k) sin) U[head] in float32; per row of k' and v and per part
    (low: the first 7/8 of the dims, 4 bits; high: the rest, 8 bits) offset = min rounded down to
    float16, scale = (max - offset) / levels rounded up, code = round((x - offset) / scale), half to
    even. So |x - (scale * code + offset)| <= scale / 2; values beyond 65504 saturate; a part that
    holds NaN or an infinity reads as NaN. A row gives the same bytes whatever the batch.
    q' = (q cos + rotate_half(q) sin) U[kv head] in float32, kv head = head // (n_q / n_kv): the
    input of `kv_attention`.

    Args:
        k, v: float32, float16 or bfloat16 [T, n_kv_heads, D], D = 64 or 128; not rotated yet.
            The tokens of k, v and q may be strided in memory, as in column slices of one tensor.
        cos, sin: float [T, D] (Hugging Face's rotate_half convention), or both None if k already
            went through RoPE.
        key_rotation: float16, bfloat16 or float32 [1 or n_kv_heads, D, D], or None.
        cache: uint8 [num_pages, n_kv_heads, page_size * token_bytes], written in place
            (`kv_pages.cache_shape`); bytes of other tokens are neither read nor written.
        slot_mapping: int64 [T], page * page_size + position of each token, distinct; a negative
            slot skips the token.
        hi_bits: 8, or 4 for one 4-bit range over all dims (the uniform baselines).
        q: [T, n_q_heads, D] in k's dtype, n_q_heads a multiple of n_kv_heads, or None; tokens
            that slot_mapping skips are rotated too.

    Returns:
        q' float32 [T, n_q_heads, D], or None without q.

    Raises:
        RuntimeError: a shape, dtype or hi_bits is not as above, on CPUs also a slot; nothing is
            written. On CUDA slots are not read on the host: one outside of the cache traps.

    Source: arXiv 2412.14363, section 4 (U_C on keys, mixed-precision cache); docs/formats.md
    section 5.
    """
    rotated = _library.call(
        torch.ops.resq.kv_append.default,
        k,
        v,
        cos,
        sin,
        key_rotation,
        cache,
        slot_mapping,
        hi_bits,
        q,
    )
    return None if q is None else rotated


@_library.register_fake("kv_append")
def _fake(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_rotation: torch.Tensor | None,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hi_bits: int = 8,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(k.dim() == 3, lambda: f"kv_append: k: expected 3 dimensions, got {k.dim()}")
    torch._check(k.shape == v.shape, lambda: f"kv_append: v: expected {k.shape}, got {v.shape}")
    return k.new_empty((0,) if q is None else q.shape, dtype=torch.float32)
