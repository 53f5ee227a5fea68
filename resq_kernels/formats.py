"""Containers and sizes of everything that is packed. docs/formats.md states the bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

FORMAT_VERSION = 2

_SUM_ROWS = 1024


class MixedTensor(NamedTuple):
    """A mixed 4/8-bit activation, x ~ scale * (code - zero), per row and part.

    Attributes:
        q_lo: low part: uint8 [..., K_lo / 2] (two signed 4-bit codes a byte, even index in the low
            nibble) or int8 [..., K_lo] (one code a byte: "containers").
        q_hi: high part: int8 [..., K_hi].
        params: float32 [..., 4] = (scale_lo, zero_lo, scale_hi, zero_hi); zeros are integers.
    """

    q_lo: torch.Tensor
    q_hi: torch.Tensor
    params: torch.Tensor

    @property
    def k_lo(self) -> int:
        """Columns of the low part."""
        return self.q_lo.shape[-1] * (2 if self.q_lo.dtype == torch.uint8 else 1)

    def dequantize(self) -> torch.Tensor:
        """scale * (code - zero) as float32 [..., K_lo + K_hi]."""
        q_lo = unpack_int4(self.q_lo) if self.q_lo.dtype == torch.uint8 else self.q_lo
        scale_lo, zero_lo, scale_hi, zero_hi = self.params.unsqueeze(-2).unbind(-1)
        return torch.cat(
            [scale_lo * (q_lo.float() - zero_lo), scale_hi * (self.q_hi.float() - zero_hi)], dim=-1
        )


def split_columns(
    columns: int, high_fraction: float, name: str = "input dimension"
) -> tuple[int, int]:
    """Columns of the INT4 and of the INT8 part: (K_lo, K_hi), K_hi = high_fraction * K exactly.

    Raises:
        ValueError: the split is not whole, or K_lo is odd (4-bit codes are stored in pairs).
    """
    k_hi = round(columns * high_fraction)
    if abs(k_hi - columns * high_fraction) > 1e-9 * columns or (columns - k_hi) % 2:
        raise ValueError(
            f"{name}: high_fraction {high_fraction} of {columns} columns must be a whole number "
            f"that leaves an even number of INT4 columns, got {columns * high_fraction}"
        )
    return columns - k_hi, k_hi


def join_heads(x: torch.Tensor, high_dims: int) -> torch.Tensor:
    """[..., n, D] -> [..., n * D]: the low dims of every head, then the last `high_dims` of every
    head, the order of o_proj's columns (docs/formats.md section 6)."""
    if high_dims == 0:
        return x.flatten(-2)
    low, high = x.split([x.shape[-1] - high_dims, high_dims], dim=-1)
    return torch.cat([low.flatten(-2), high.flatten(-2)], dim=-1)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes in [-8, 7], int8 [..., K] with even K -> uint8 [..., K / 2]."""
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] -> signed codes int8 [..., K]; inverse of `pack_int4`."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def weight_sums(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    """Exact row sums of a weight's codes, int32 [N, 2]: the zero-point correction of mixed_gemm.

    Args:
        codes_lo: uint8 [N, K_lo / 2] packed 4-bit codes.
        codes_hi: int8 [N, K_hi].
    """
    # torch converts what it sums: four bytes a code, a gigabyte for a vocabulary.
    parts = zip(codes_lo.split(_SUM_ROWS), codes_hi.split(_SUM_ROWS), strict=True)
    return torch.cat(
        [
            torch.stack([codes.sum(1, dtype=torch.int32) for codes in (unpack_int4(lo), hi)], dim=1)
            for lo, hi in parts
        ]
    )


def packed_weight_bytes(n: int, k_lo: int, k_hi: int, device_type: str = "cpu") -> int:
    """Size of a packed weight: docs/formats.md section 3.2 (CPU) or 3.3 ("cuda")."""
    rows, columns = (64, 64) if device_type == "cuda" else (32, 8)
    padded_n = (n + rows - 1) // rows * rows
    padded_lo, padded_hi = ((k + columns - 1) // columns * columns for k in (k_lo, k_hi))
    return padded_n * (padded_lo // 2 + padded_hi)
