"""Prefill: attention of many new tokens, in 16 bits over dequantized pages.

`ops.kv_attention` unpacks the codes of a tile for every 16 rows of queries. For a step of many
tokens, this module unpacks them once and then calls torch's attention
(docs/notes/0016-prefill.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from resq_kernels import ops

# Up to this many new tokens `kv_attention` is faster: `attend` writes and reads 16-bit keys and
# values once per step, however few its tokens, and 128 rows fill a tile of torch's kernel.
KV_ATTENTION_TOKENS = 64

# Limit on the keys and values of one call, unless a single sequence needs more. They live for one
# call; a call of this size has work for every multiprocessor.
CALL_BYTES = 1 << 28


def is_faster(device_type: str, new: int, batch_invariant: bool) -> bool:
    """Whether a step goes through `attend` and not through `ops.kv_attention`.

    Args:
        device_type: where the pages are. On CPUs `kv_attention` is faster at every length, and
            its bits do not depend on chunking.
        new: new tokens of the step, of the sequence with the most.
        batch_invariant: whether the bits must not depend on the batch or on chunking, which
            torch's attention does not promise.
    """
    return device_type == "cuda" and new > KV_ATTENTION_TOKENS and not batch_invariant


class VarlenGroup(NamedTuple):
    """Consecutive sequences of the same lengths, for one call of torch's attention."""

    first: int  # sequence
    sequences: int
    new: int
    length: int


def varlen_groups(lengths: Sequence[tuple[int, int]], token_bytes: int) -> list[VarlenGroup]:
    """Splits a batch into calls that need no mask or padding and are not too large.

    Args:
        lengths: (new tokens, all tokens) of every sequence; those without new tokens are left out.
        token_bytes: size of a token's keys and values in 16 bits.
    """
    found, first = [], 0
    for (new, length), run in groupby(lengths):
        end = first + len(list(run))
        most = max(1, CALL_BYTES // max(1, length * token_bytes))
        while first < end:
            count = min(most, end - first)
            if new:
                found.append(VarlenGroup(first, count, new, length))
            first += count
    return found


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    lengths: Sequence[tuple[int, int]],
    scale: float,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Computes `ops.kv_attention` up to the rounding of q, K, V and the weights to `dtype`.

    Formula: softmax(scale q K^T) V over the visible tokens, with K and V of `ops.kv_dequantize`.
    Query i of a sequence with n new tokens of `length` sees the first length - n + i + 1. Every
    sequence is computed at its own lengths, so that no padding is read. A NaN in a token may reach
    queries that do not see it, and a rotated query beyond 65504 is infinite in float16.

    Args:
        q: float [T, n_q_heads, D] after RoPE and rotation (`ops.kv_append`), the new tokens of all
            sequences one after the other.
        cache, block_table, seq_lens: as in `ops.kv_attention`.
        lengths: (new tokens, all tokens) of every sequence; the second is seq_lens on the host.
        scale: factor on the scores.
        dtype: dtype of the factors; sums are float32.

    Returns:
        [T, n_q_heads, D] in `dtype`.

    Raises:
        ValueError: q does not have one row per new token, or a sequence has more new tokens than
            tokens.
    """
    n_q, head_dim = q.shape[1:]
    tokens = sum(new for new, _ in lengths)
    if len(q) != tokens:
        raise ValueError(
            f"prefill: q: expected {tokens} rows, the new tokens of all sequences, got {len(q)}"
        )
    if wrong := [pair for pair in lengths if pair[0] > pair[1]]:
        raise ValueError(
            "prefill: lengths: expected at most as many new tokens as tokens, got "
            f"{wrong[0][0]} of {wrong[0][1]}"
        )
    token_bytes = 2 * cache.shape[1] * head_dim * dtype.itemsize
    parts, row = [], 0
    for first, count, new, length in varlen_groups(lengths, token_bytes):
        own_table, own_lens = (x.narrow(0, first, count) for x in (block_table, seq_lens))
        k, v = ops.kv_dequantize(cache, own_table, own_lens, length, head_dim, dtype)
        rows = q.narrow(0, row, count * new).to(dtype).view(count, new, n_q, head_dim)
        out = scaled_dot_product_attention(
            rows.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            causal_lower_right(new, length),
            scale=scale,
            enable_gqa=True,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        row += count * new
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty_like(q, dtype=dtype)
