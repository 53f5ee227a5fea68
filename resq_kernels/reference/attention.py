"""The specification of the KV cache's operators, and RoPE."""

from __future__ import annotations

import torch

from resq_kernels.formats import join_heads
from resq_kernels.kv_pages import LARGEST, page_size_of
from resq_kernels.reference.kv_pages import quantize_rows, read_tokens, write_tokens


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: x cos + rotate_half(x) sin of x [..., D]; cos and sin broadcast to x.

    nn/attention.py has its own copy: modules that run a model do not import the specification.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """x [T, heads, D] in float32, after RoPE unless cos and sin, [T, D] each, are None."""
    x = x.float()
    if cos is None or sin is None:
        return x
    return apply_rope(x, cos.float()[:, None], sin.float()[:, None])


def rotate_heads(x: torch.Tensor, key_rotation: torch.Tensor | None, n_kv: int) -> torch.Tensor:
    """x [T, heads, D] float32, each head times the rotation [1 or n_kv, D, D] of its kv head."""
    if key_rotation is None:
        return x
    rotation = key_rotation.float().expand(n_kv, -1, -1)
    rotation = rotation.repeat_interleave(x.shape[1] // max(n_kv, 1), dim=0)
    return torch.einsum("thd,hde->the", x, rotation)


def kv_fake_quantize(x: torch.Tensor, hi_bits: int = 8) -> torch.Tensor:
    """Rows [..., D] in float32 after a round trip through a page.

    Formula: scale * code + offset with the codes of `quantize_rows`.
    """
    return quantize_rows(x, hi_bits).dequantize()


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
    """Applies RoPE and the key rotation to k and q, quantizes k and v per token and head, and
    writes them into the pages.

    Formula: k' = rope(k) U[head]; codes of k' and v by `quantize_rows`; tokens whose slot is
    negative are skipped. Returns q' = rope(q) U[kv head], or None without q.
    """
    n_kv = k.shape[1]
    k = rotate_heads(rope(k, cos, sin), key_rotation, n_kv)
    kept = slot_mapping >= 0
    k_rows = quantize_rows(k[kept], hi_bits)
    v_rows = quantize_rows(v[kept], hi_bits)
    write_tokens(cache, slot_mapping[kept], k_rows, v_rows)
    return None if q is None else rotate_heads(rope(q, cos, sin), key_rotation, n_kv)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal GQA attention of one sequence, bottom-right aligned, in the dtype of the inputs.

    Args:
        q: [n, n_q, D], of the last n tokens of the sequence.
        k, v: [length, n_kv, D].

    Returns:
        [n, n_q, D]; zeros for queries before the first key.
    """
    n, length = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible = torch.arange(length) < length - n + 1 + torch.arange(n)[:, None]  # [n, length]
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weights = torch.where(visible.any(-1)[:, None], weights, 0.0)
    # The value of a masked token may be NaN, and 0 times NaN would not be 0.
    out = torch.einsum("hnl,lhd->nhd", weights, torch.nan_to_num(v))
    nan_mass = torch.einsum("nl,lhd->nhd", visible.to(v.dtype), torch.isnan(v).to(v.dtype))
    return out.masked_fill(nan_mass > 0, torch.nan)


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
    """Causal GQA attention over the pages; arguments as in `ops.kv_attention`.

    Formula: per sequence softmax(scale q K^T + causal mask) V with the dequantized K and V, in
    float32.
    """
    head_dim, page_size = q.shape[-1], page_size_of(cache, q.shape[-1])
    out = torch.zeros(q.shape)
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = query_starts[i : i + 2].tolist()
        position = torch.arange(length)
        slots = block_table[i].long()[position // page_size] * page_size + position % page_size
        k, v = (rows.dequantize() for rows in read_tokens(cache, slots, head_dim))
        out[begin:end] = attend(q[begin:end].float(), k, v, scale)
    out = out.to(out_dtype or q.dtype)
    return out if head_dim_hi is None else join_heads(out, head_dim_hi)


def kv_dequantize(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dequantized keys and values, [S, max_tokens, n_kv, D]; arguments as in
    `ops.kv_dequantize`.

    Formula: scale * code + offset in float32, rounded once to dtype, float16 saturating at 65504;
    0 past a sequence's length.
    """
    page_size = page_size_of(cache, head_dim)
    shape = (block_table.shape[0], max_tokens, cache.shape[1], head_dim)
    out = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    for i, length in enumerate(seq_lens.tolist()):
        position = torch.arange(length)
        slots = block_table[i].long()[position // page_size] * page_size + position % page_size
        for rows, values in zip(read_tokens(cache, slots, head_dim), out, strict=True):
            exact = rows.dequantize()
            if dtype == torch.float16:
                exact = exact.clamp_max(LARGEST)
            values[i, :length] = exact.to(dtype)
    return out
