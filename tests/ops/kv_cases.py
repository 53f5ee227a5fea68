"""Sequences in pages, for the tests of kv_append and kv_attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from resq_kernels import kv_pages, ops
from resq_kernels.reference.attention import rope
from resq_kernels.reference.kv_pages import read_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 128]


def rotations(count: int, head_dim: int) -> torch.Tensor:
    """Random orthogonal matrices [count, D, D]."""
    return torch.linalg.qr(torch.randn(count, head_dim, head_dim))[0].contiguous()


def cos_sin(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, D] of random angles, both halves equal as in Hugging Face."""
    angles = (torch.rand(tokens, head_dim // 2) * 6.3).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated_queries(
    q: torch.Tensor,
    n_kv: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotation: torch.Tensor | None,
    kv_append: Callable[..., torch.Tensor] = ops.kv_append,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q' of `kv_append`, whose tokens are all padding, and rope(q) U in float64.

    The latter is exact from the float32 product on that the specification of RoPE names.
    """
    tokens, n_q, head_dim = q.shape
    k = torch.zeros(tokens, n_kv, head_dim, dtype=q.dtype)
    cache = torch.zeros(kv_pages.cache_shape(1, n_kv, 32, head_dim), dtype=torch.uint8)
    slots = torch.full((tokens,), -1)
    rotated = kv_append(k, k, cos, sin, rotation, cache, slots, 8, q)
    exact = rope(q, cos, sin).double()
    if rotation is not None:
        per_head = rotation.double().expand(n_kv, -1, -1).repeat_interleave(n_q // n_kv, 0)
        exact = torch.einsum("thd,hde->the", exact, per_head)
    return rotated, exact


def page_slots(pages: torch.Tensor, page_size: int, length: int) -> torch.Tensor:
    """Slots of the tokens 0..length-1 of a sequence with the pages given, int64 [length]."""
    position = torch.arange(length)
    return pages.long()[position // page_size] * page_size + position % page_size


@dataclasses.dataclass
class Pages:
    """A cache with sequences in scattered pages; what no token owns is 0xFF (NaN bits)."""

    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    head_dim: int

    @property
    def page_size(self) -> int:
        return kv_pages.page_size_of(self.cache, self.head_dim)

    def rows(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of a sequence, float64 [length, n_kv, D]."""
        length = int(self.seq_lens[sequence])
        slots = page_slots(self.block_table[sequence], self.page_size, length)
        k, v = read_tokens(self.cache, slots, self.head_dim)
        return k.dequantize().double(), v.dequantize().double()


def hard_rows(
    lengths: list[int], n_kv: int, head_dim: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """k and v of many magnitudes; the third sequence also has NaN and the largest numbers."""
    k, v = (
        [
            torch.randn(length, n_kv, head_dim)
            * torch.exp2(torch.randint(-20, 12, (length, n_kv, 1)).float())
            for length in lengths
        ]
        for _ in "kv"
    )
    k[2][3, 0, 5], v[2][4, 1, head_dim - 1] = torch.nan, torch.inf
    k[2][5:40] = 65504 * (2 * torch.rand(35, n_kv, head_dim) - 1)
    k[2][5:40, :, 0], k[2][5:40, :, 1] = -65504, 65504
    return k, v


def fill_pages(
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    page_size: int,
    hi_bits: int = 8,
    garbage: int = 255,
) -> Pages:
    """Appends sequences, k and v [length, n_kv, D] each, to pages in random order."""
    n_kv, head_dim = k[0].shape[1:]
    lengths = [len(rows) for rows in k]
    counts = [-(-length // page_size) for length in lengths]
    shape = kv_pages.cache_shape(sum(counts) + 2, n_kv, page_size, head_dim)
    cache = torch.full(shape, garbage, dtype=torch.uint8)
    order = torch.randperm(shape[0]).int()
    # Unused entries of the block table are never read: they hold pages that do not exist.
    table = torch.full((len(k), max(counts) + 1), 1 << 30, dtype=torch.int32)
    for i, count in enumerate(counts):
        table[i, :count] = order[sum(counts[:i]) : sum(counts[:i]) + count]
        slots = page_slots(table[i], page_size, lengths[i])
        ops.kv_append(k[i], v[i], None, None, None, cache, slots, hi_bits)
    return Pages(cache, table, torch.tensor(lengths, dtype=torch.int32), head_dim)
