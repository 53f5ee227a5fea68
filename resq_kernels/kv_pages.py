"""The pages of the 4-bit KV cache: sizes, places of the codes, encoder and decoder.

Mirrors csrc/core/kv_page.h; docs/formats.md section 5 states the bytes. The functions work on
whole tensors and serve the reference, tests and tools; the kernels read and write pages themselves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

HEAD_DIMS = (64, 128)
DEFAULT_PAGE_SIZE = 64
TILE_BYTES = 1152  # 9 words x 32 lanes x 4 bytes
METADATA_BYTES = 16
LOW_LEVELS, HIGH_LEVELS = 15, 255
LARGEST = 65504.0  # largest float16; larger values saturate
SCALE_FACTOR = 4.0  # stored scale / scale
NAN_BITS = 0x7E00


class KvPlace(NamedTuple):
    """Where a code lies inside its tile: a whole byte, or the nibble at bit `shift` of it."""

    byte: int
    shift: int
    wide: bool


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


def low_dims(head_dim: int) -> int:
    """Dims of the 4-bit part: the first 7/8.

    Raises:
        ValueError: the head dimension has no layout.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected 64 or 128, got {head_dim}")
    return head_dim // 8 * 7


def tile_tokens(head_dim: int) -> int:
    """Tokens of a tile; a page holds a whole number of tiles."""
    low_dims(head_dim)
    return 2048 // head_dim


def row_bytes(head_dim: int) -> int:
    """Bytes that one token owns in a K tile, and as many in a V tile."""
    return TILE_BYTES // tile_tokens(head_dim)


def token_bytes(head_dim: int) -> int:
    """Bytes per token and kv head, K and V together: 160 at head_dim 128, 88 at 64."""
    return 2 * row_bytes(head_dim) + METADATA_BYTES


def cache_shape(num_pages: int, n_kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
    """Shape of a layer's cache, uint8.

    Raises:
        ValueError: page_size is not a positive multiple of the tile.
    """
    tile = tile_tokens(head_dim)
    if page_size < 1 or page_size % tile:
        raise ValueError(
            f"page_size: expected a positive multiple of {tile} at head_dim {head_dim}, "
            f"got {page_size}"
        )
    return num_pages, n_kv_heads, page_size * token_bytes(head_dim)


def page_size_of(cache: torch.Tensor, head_dim: int) -> int:
    """Tokens per page of a cache, uint8 [num_pages, n_kv_heads, page_size * token_bytes]."""
    page_size = cache.shape[2] // token_bytes(head_dim)
    if cache.shape[2] != page_size * token_bytes(head_dim) or page_size % tile_tokens(head_dim):
        raise ValueError(
            f"cache: expected pages of a multiple of {tile_tokens(head_dim)} tokens of "
            f"{token_bytes(head_dim)} bytes, got {cache.shape[2]} bytes"
        )
    return page_size


def _word_byte(word: int, lane: int) -> int:
    return word // 4 * 512 + lane * 16 + word % 4 * 4 if word < 8 else 1024 + lane * 4


def _nibble(word: int, lane: int, nibble: int) -> KvPlace:
    return KvPlace(_word_byte(word, lane) + nibble // 2, nibble % 2 * 4, False)


def _low_place(
    head_dim: int, group: int, half: int, block: int, part: int, odd: int, lane: int
) -> KvPlace:
    full_words = 3 if head_dim == 128 else 1
    if block < 2 * full_words:
        word = 3 * group + half * full_words + block // 2
        return _nibble(word, lane, block % 2 * 2 + part + 4 * odd)
    return _nibble(3 * group + 2 * full_words, lane, 2 * half + part + 4 * odd)


def _high_place(head_dim: int, token: int, dim: int, odd: int, lane: int) -> KvPlace:
    group, half = token // 16, token // 8 % 2
    if head_dim == 128:
        return KvPlace(_word_byte(7 + half, lane) + dim % 16 // 8 * 2 + odd, 0, True)
    return KvPlace(_word_byte(7 + group, lane) + 2 * half + odd, 0, True)


def kv_k_place(head_dim: int, token: int, dim: int) -> KvPlace:
    """The place of dim `dim` of the tile's token `token` in a K tile."""
    low = low_dims(head_dim)
    group, half, odd = token // 16, token // 8 % 2, dim % 2
    lane = token % 8 * 4 + dim % 8 // 2
    if dim >= low:
        return _high_place(head_dim, token, dim, odd, lane)
    if dim < low // 16 * 16:
        return _low_place(head_dim, group, half, dim // 16, dim % 16 // 8, odd, lane)
    return KvPlace(_word_byte(6, lane) + 2 * group + half, 4 * odd, False)


def kv_v_place(head_dim: int, token: int, dim: int) -> KvPlace:
    """The place of dim `dim` of the tile's token `token` in a V tile."""
    low = low_dims(head_dim)
    group, half, odd = token // 16, token // 8 % 2, token % 2
    lane = dim % 8 * 4 + token % 8 // 2
    if dim >= low:
        return _high_place(head_dim, token, dim, odd, lane)
    if dim < low // 16 * 16:
        return _low_place(head_dim, group, half, dim // 16, dim % 16 // 8, odd, lane)
    lane = (dim % 4 + 4 * group) * 4 + token % 8 // 2
    return _nibble(6, lane, 2 * half + dim % 8 // 4 + 4 * odd)


@functools.cache
def place_table(kind: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(byte, shift, mask) of every code of a "k" or "v" tile, int64 [tile_tokens, head_dim]."""
    place = {"k": kv_k_place, "v": kv_v_place}[kind]
    places = [
        [place(head_dim, token, dim) for dim in range(head_dim)]
        for token in range(tile_tokens(head_dim))
    ]
    byte, shift, wide = torch.tensor(places, dtype=torch.int64).unbind(-1)
    return byte, shift, torch.where(wide > 0, 255, 15)


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
    """For each slot [T]: offset of its tile inside the chunk, and its token inside the tile."""
    page_size, tile = page_size_of(cache, head_dim), tile_tokens(head_dim)
    position = slots % page_size
    start = page_size * (row_bytes(head_dim) + METADATA_BYTES) if kind == "v" else 0
    return start + position // tile * TILE_BYTES, position % tile


def _metadata_index(cache: torch.Tensor, slots: torch.Tensor, head_dim: int) -> torch.Tensor:
    page_size = page_size_of(cache, head_dim)
    start = page_size * row_bytes(head_dim) + slots % page_size * METADATA_BYTES
    return start[:, None] + torch.arange(METADATA_BYTES)


def write_tokens(cache: torch.Tensor, slots: torch.Tensor, k: KvRows, v: KvRows) -> None:
    """Writes quantized rows into pages; touches no byte of another token.

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
    # clone: contiguous() keeps the strides of an empty tensor, which view() refuses.
    metadata = cache[page[:, None], :, index].movedim(2, 1)
    ranges = metadata.clone(memory_format=torch.contiguous_format).view(torch.float16)
    return (
        KvRows(codes[0].to(torch.uint8), ranges[..., :4]),
        KvRows(codes[1].to(torch.uint8), ranges[..., 4:]),
    )
