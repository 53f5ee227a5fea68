"""The format of the 4-bit KV cache's pages: sizes, and where each code lies.

Mirrors csrc/core/kv_page.h; docs/formats.md section 5 specifies the bytes. The kernels read and
write pages themselves; reference/kv_pages.py encodes and decodes them in plain torch.
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
