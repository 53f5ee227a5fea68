"""Encoder and decoder of the 4-bit KV cache's pages in plain torch.

kv_pages.py has the sizes and places of the bytes; docs/formats.md section 5 specifies both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from resq_kernels.kv_pages import (
    HIGH_LEVELS,
    LARGEST,
    LOW_LEVELS,
    METADATA_BYTES,
    NAN_BITS,
    SCALE_FACTOR,
    TILE_BYTES,
    low_dims,
    page_size_of,
    place_table,
    row_bytes,
    tile_tokens,
)


class KvRows(NamedTuple):
    """Quantized rows, x ~ scale * code + offset with scale = stored scale / SCALE_FACTOR.

    Attributes:
        codes: uint8 [..., D]; at most 15 in the low dims, at most 255 in the high ones.
        ranges: float16 [..., 4] = stored (scale, offset) of the low and of the high dims.
    """

    codes: torch.Tensor
    ranges: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """scale * code + offset in float32 [..., D]: one product and one sum, each rounded."""
        low = low_dims(self.codes.shape[-1])
        ranges = self.ranges.float()
        scale, offset = ranges[..., 0::2] / SCALE_FACTOR, ranges[..., 1::2]
        sizes = torch.tensor([low, self.codes.shape[-1] - low])
        scale = torch.repeat_interleave(scale, sizes, dim=-1)
        return self.codes.float() * scale + torch.repeat_interleave(offset, sizes, dim=-1)


def _half_below(x: torch.Tensor) -> torch.Tensor:
    """Largest float16 <= x, for finite |x| <= 65504."""
    nearest = x.half()
    bits = nearest.view(torch.int16)
    step = torch.where(bits < 0, 1, -1).to(torch.int16)  # int16 is negative where the sign is set
    return torch.where(nearest.float() > x, bits + step, bits).view(torch.float16)


def _quantize_part(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., n] -> codes uint8 [..., n], stored (scale, offset) float16 [..., 2]."""
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0).clamp(-LARGEST, LARGEST)
    offset = _half_below(x.amin(-1, keepdim=True) + 0.0)
    step = (x.amax(-1, keepdim=True) + 0.0 - offset.float()) / levels
    stored_scale = -_half_below(-(step * SCALE_FACTOR))
    scale = stored_scale.float() / SCALE_FACTOR
    inv_scale = torch.where(scale > 0, 1.0 / scale, 0.0)
    codes = torch.round((x - offset.float()) * inv_scale).clamp(0, levels)
    ranges = torch.cat([stored_scale, offset], dim=-1)
    nan = torch.full_like(ranges.view(torch.int16), NAN_BITS).view(torch.float16)
    return torch.where(finite, codes, 0.0).to(torch.uint8), torch.where(finite, ranges, nan)


def quantize_rows(x: torch.Tensor, hi_bits: int = 8) -> KvRows:
    """Rows [..., D] of K or V -> codes and ranges.

    Formula: per part, offset = min(x) rounded down to float16, scale = (max(x) - offset) / levels
    with 4 x scale rounded up to float16, code = round((x - offset) / scale), half to even. So
    |x - (scale * code + offset)| <= scale / 2 for every |x| <= 65504; larger values saturate.
    A part that holds NaN or an infinity has NaN for both.

    Args:
        x: float [..., D]; computed in float32.
        hi_bits: 8 for 4-bit low dims and 8-bit high dims, each with a range of its own; 4 for one
            4-bit range over all dims (both stored pairs are then equal).
    """
    x = x.float()
    low = low_dims(x.shape[-1])
    if hi_bits == 4:
        codes, ranges = _quantize_part(x, LOW_LEVELS)
        return KvRows(codes, torch.cat([ranges, ranges], dim=-1))
    if hi_bits != 8:
        raise ValueError(f"hi_bits: expected 4 or 8, got {hi_bits}")
    codes_lo, ranges_lo = _quantize_part(x[..., :low], LOW_LEVELS)
    codes_hi, ranges_hi = _quantize_part(x[..., low:], HIGH_LEVELS)
    return KvRows(torch.cat([codes_lo, codes_hi], -1), torch.cat([ranges_lo, ranges_hi], -1))


def _tile_bytes(
    kind: str, cache: torch.Tensor, slots: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each slot [T]: offset of its tile in the bytes of its page and head, and its token in the
    tile."""
    page_size, tile = page_size_of(cache, head_dim), tile_tokens(head_dim)
    position = slots % page_size
    start = page_size * (row_bytes(head_dim) + METADATA_BYTES) if kind == "v" else 0
    return start + position // tile * TILE_BYTES, position % tile


def _metadata_index(cache: torch.Tensor, slots: torch.Tensor, head_dim: int) -> torch.Tensor:
    page_size = page_size_of(cache, head_dim)
    start = page_size * row_bytes(head_dim) + slots % page_size * METADATA_BYTES
    return start[:, None] + torch.arange(METADATA_BYTES)


def write_tokens(cache: torch.Tensor, slots: torch.Tensor, k: KvRows, v: KvRows) -> None:
    """Writes quantized rows into pages; leaves the bytes of all other tokens as they are.

    Args:
        cache: uint8 [num_pages, n_kv_heads, page_size * token_bytes], written in place.
        slots: int64 [T] = page * page_size + position; distinct, none negative.
        k, v: rows [T, n_kv_heads, D].
    """
    head_dim = k.codes.shape[-1]
    page = slots // page_size_of(cache, head_dim)
    for kind, rows in (("k", k), ("v", v)):
        start, token = _tile_bytes(kind, cache, slots, head_dim)
        byte, shift, _ = (table[token] for table in place_table(kind, head_dim))  # [T, D]
        tiles = torch.zeros(*rows.codes.shape[:2], TILE_BYTES, dtype=torch.int64)
        index = byte[:, None].expand(rows.codes.shape)
        tiles.scatter_add_(2, index, rows.codes.long() << shift[:, None])
        chunk_byte = start[:, None] + byte
        for head in range(cache.shape[1]):
            values = tiles[:, head].gather(1, byte).to(torch.uint8)
            cache[page[:, None], head, chunk_byte] = values
    metadata = torch.cat([k.ranges, v.ranges], dim=-1).contiguous().view(torch.uint8)
    index = _metadata_index(cache, slots, head_dim)
    for head in range(cache.shape[1]):
        cache[page[:, None], head, index] = metadata[:, head]


def read_tokens(cache: torch.Tensor, slots: torch.Tensor, head_dim: int) -> tuple[KvRows, KvRows]:
    """The quantized rows of K and V, [T, n_kv_heads, D], of slots int64 [T]: inverse of
    `write_tokens`."""
    page = slots // page_size_of(cache, head_dim)
    codes = []
    for kind in ("k", "v"):
        start, token = _tile_bytes(kind, cache, slots, head_dim)
        byte, shift, mask = (table[token] for table in place_table(kind, head_dim))
        values = cache[page[:, None], :, start[:, None] + byte].long()  # [T, D, n_kv_heads]
        codes.append((values.movedim(2, 1) >> shift[:, None]) & mask[:, None])
    index = _metadata_index(cache, slots, head_dim)
    # clone, since contiguous() keeps the strides of an empty tensor and view() refuses those.
    metadata = cache[page[:, None], :, index].movedim(2, 1)
    ranges = metadata.clone(memory_format=torch.contiguous_format).view(torch.float16)
    return (
        KvRows(codes[0].to(torch.uint8), ranges[..., :4]),
        KvRows(codes[1].to(torch.uint8), ranges[..., 4:]),
    )
