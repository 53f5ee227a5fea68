"""Activations and weights in 4 and 8 bits: types, packing, sizes.

docs/formats.md specifies the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from resq_kernels.config import ResQConfig

FORMAT_VERSION = 6

_READ_BYTES = 4 << 20  # codes that are read at a time, counted as one byte each
_SUM_ROWS = 1024
# Packed weights consist of blocks of 32 rows on CPUs and of 64 on CUDA. Packed weights of whole
# blocks, concatenated, are therefore the packed weight of all their rows (docs/formats.md
# section 3).
_BLOCK_ROWS = 64


class RowFormat(NamedTuple):
    """How rows of activations are quantized: the options of every quantizer, in their order.

    Attributes:
        k_hi: columns of the INT8 part, the last ones.
        lo_bits: 4 or 8, bits of the low part.
        packed: whether two 4-bit codes share a byte; None: the faster one on the device.
        symmetric: zero = 0.
        clip: factor on the range of the low part, in (0, 1].
    """

    k_hi: int
    lo_bits: int = 4
    packed: bool | None = None
    symmetric: bool = False
    clip: float = 1.0

    @classmethod
    def of(cls, config: ResQConfig, columns: int, k_hi: int) -> RowFormat:
        """The format of rows with `columns`, `k_hi` of them high, in a model of `config`."""
        return cls(k_hi, config.lo_bits, None, config.symmetric, config.clip(columns - k_hi))


class MixedTensor(NamedTuple):
    """A mixed 4/8-bit activation, x ~ scale * (code - zero), per row and part.

    Attributes:
        q_lo: low part: uint8 [..., K_lo / 2] (two signed 4-bit codes a byte, even index in the low
            nibble) or int8 [..., K_lo] (unpacked: one code a byte).
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


class QuantizedWeight(NamedTuple):
    """The canonical tensors of a weight [N, K_lo + K_hi] ~ scale * code (docs/formats.md 3.1).

    Attributes:
        weight_lo: uint8 [N, K_lo / 2], two signed 4-bit codes a byte.
        weight_hi: int8 [N, K_hi].
        weight_scale: float32 [N, 2], of the low and of the high part.
    """

    weight_lo: torch.Tensor
    weight_hi: torch.Tensor
    weight_scale: torch.Tensor

    @classmethod
    def cat(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Concatenates the rows of `weights`, which have the same columns."""
        return cls(*map(torch.cat, zip(*weights, strict=True)))

    def split(self, rows: Sequence[int]) -> list[QuantizedWeight]:
        """Splits it into weights of `rows` rows each, slices of this one."""
        parts = zip(*(tensor.split(rows) for tensor in self), strict=True)
        return [QuantizedWeight(*tensors) for tensors in parts]

    @property
    def n(self) -> int:
        """N, output rows."""
        return self.weight_scale.shape[0]

    @property
    def k_lo(self) -> int:
        """Columns of the INT4 part."""
        return 2 * self.weight_lo.shape[1]

    @property
    def k_hi(self) -> int:
        """Columns of the INT8 part."""
        return self.weight_hi.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, K_lo and K_hi."""
        return self.n, self.k_lo, self.k_hi

    def dequantize(self) -> torch.Tensor:
        """scale * code as float32 [N, K]: exactly the weight that kernels compute with."""
        scale_lo, scale_hi = self.weight_scale.split(1, dim=1)
        return torch.cat([scale_lo * unpack_int4(self.weight_lo), scale_hi * self.weight_hi], dim=1)

    @classmethod
    def read(cls, load: Callable[[str], torch.Tensor], linear: str) -> QuantizedWeight:
        """The weight of the linear `linear`; `load` gives a tensor by its name as in `named`."""
        return cls(*(load(f"{linear}.{name}") for name in cls._fields))

    def named(self, linear: str) -> dict[str, torch.Tensor]:
        """The tensors under their names in a checkpoint, for the linear `linear`."""
        return {f"{linear}.{name}": tensor for name, tensor in self._asdict().items()}


class PackedWeight(NamedTuple):
    """A weight [N, K_lo + K_hi] as `mixed_gemm` reads it: codes in the layout of their device.

    Attributes:
        data: uint8, one dimension, the codes in blocks of rows (docs/formats.md 3.2 and 3.3).
        scale: float32 [N, 2].
        sums: int32 [N, 2], `weight_sums` of the codes.
        k_lo, k_hi: columns of the INT4 and of the INT8 part.
    """

    data: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor
    k_lo: int
    k_hi: int

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> PackedWeight:
        """Packs canonical codes for the kernel of their device; the scale is not copied."""
        lo, hi, scale = weight
        data = torch.ops.resq.pack_weight(lo, hi)
        on_cpu = data.device.type == "cpu"
        sums = packed_weight_sums(data, *weight.sizes) if on_cpu else weight_sums(lo, hi)
        return cls(data, scale, sums, weight.k_lo, weight.k_hi)

    @classmethod
    def read(
        cls, read: Callable[[int, int], QuantizedWeight], n: int, columns: int
    ) -> PackedWeight:
        """The packed weight of rows that are read, and packed, some megabytes at a time.

        Args:
            read: gives rows start <= row < stop; its tensors may be overwritten by the next call.
            n, columns: N and K_lo + K_hi.
        """
        rows = max(_READ_BYTES // columns // _BLOCK_ROWS, 1) * _BLOCK_ROWS
        if n <= rows:
            weight = cls.pack(read(0, n))
            return weight._replace(scale=weight.scale.clone())
        part = cls.pack(read(0, rows))
        size = partial(packed_weight_bytes, device_type=part.data.device.type)
        data = part.data.new_empty(size(n, *part[3:]))
        scale, sums = part.scale.new_empty(n, 2), part.sums.new_empty(n, 2)
        for start in range(0, n, rows):
            if start > 0:
                part = cls.pack(read(start, min(start + rows, n)))
            place, stop = size(start, *part[3:]), start + part.n
            data[place : place + len(part.data)] = part.data
            scale[start:stop], sums[start:stop] = part.scale, part.sums
        return cls(data, scale, sums, *part[3:])

    @classmethod
    def cat(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """Concatenates the rows of `weights`, which have the same columns."""
        if any(weight.n % _BLOCK_ROWS for weight in weights[:-1]):
            return cls.pack(QuantizedWeight.cat([weight.codes() for weight in weights]))
        data, scale, sums, k_lo, k_hi = zip(*weights, strict=True)
        return cls(torch.cat(data), torch.cat(scale), torch.cat(sums), k_lo[0], k_hi[0])

    def split(self, rows: Sequence[int]) -> list[PackedWeight]:
        """Splits it into weights of `rows` rows each, the inverse of `cat`; slices if possible."""
        if any(n % _BLOCK_ROWS for n in rows[:-1]):
            return [PackedWeight.pack(weight) for weight in self.codes().split(rows)]
        columns, device = (self.k_lo, self.k_hi), self.data.device.type
        data = self.data.split([packed_weight_bytes(n, *columns, device) for n in rows])
        slices = zip(data, self.scale.split(rows), self.sums.split(rows), strict=True)
        return [PackedWeight(*tensors, *columns) for tensors in slices]

    @property
    def n(self) -> int:
        """N, output rows."""
        return self.scale.shape[0]

    def codes(self) -> QuantizedWeight:
        """The canonical tensors; the scale is not copied."""
        lo, hi = torch.ops.resq.unpack_weight(self.data, self.n, self.k_lo, self.k_hi)
        return QuantizedWeight(lo, hi, self.scale)


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


def join_heads(x: torch.Tensor, head_dim_hi: int) -> torch.Tensor:
    """[..., n, D] -> [..., n * D]: the low dims of every head, then the last `head_dim_hi` of every
    head, the order of o_proj's columns (docs/formats.md section 6)."""
    if head_dim_hi == 0:
        return x.flatten(-2)
    low, high = x.split([x.shape[-1] - head_dim_hi, head_dim_hi], dim=-1)
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
    # torch converts the codes before it sums them: four bytes each, a gigabyte for a vocabulary.
    parts = zip(codes_lo.view(torch.int8).split(_SUM_ROWS), codes_hi.split(_SUM_ROWS), strict=True)
    # The two codes of a byte by arithmetic shifts; their sum fits a byte.
    return torch.cat(
        [
            torch.stack(
                [codes.sum(1, dtype=torch.int32) for codes in ((lo >> 4) + (lo << 4 >> 4), hi)],
                dim=1,
            )
            for lo, hi in parts
        ]
    )


def packed_weight_sums(data: torch.Tensor, n: int, k_lo: int, k_hi: int) -> torch.Tensor:
    """`weight_sums` of the codes in a packed weight, in a seventh of the time on a CPU.

    Formula: W 1, by the kernel: a row of activations is 1 in the low columns, another in the high
    ones. `mixed_gemm` takes at most 2^16 columns, so the sums are below 2^24 and float32 exact.

    Args:
        data: what `pack_weight` returned for a weight of these sizes.
        n, k_lo, k_hi: N, K_lo, K_hi.
    """
    # A caller may have set another device or dtype by default.
    device, f32 = data.device, torch.float32
    low = torch.zeros(2, k_lo // 2, dtype=torch.uint8, device=device)
    high = torch.zeros(2, k_hi, dtype=torch.int8, device=device)
    low[0], high[1] = 0x11, 1  # two codes a byte, one code a byte
    params = torch.tensor([[1, 0, 1, 0]] * 2, dtype=f32, device=device)  # scales 1, zeros 0
    scale = torch.ones(n, 2, dtype=f32, device=device)
    weight = (data, scale, torch.zeros_like(scale, dtype=torch.int32))
    products: torch.Tensor = torch.ops.resq.mixed_gemm(low, high, params, *weight, None, f32)
    return products.t().int().contiguous()


def packed_weight_bytes(n: int, k_lo: int, k_hi: int, device_type: str = "cpu") -> int:
    """Size of a packed weight: docs/formats.md section 3.2 (CPU) or 3.3 ("cuda")."""
    rows, columns = (64, 64) if device_type == "cuda" else (32, 8)
    padded_n = (n + rows - 1) // rows * rows
    padded_lo, padded_hi = ((k + columns - 1) // columns * columns for k in (k_lo, k_hi))
    return padded_n * (padded_lo // 2 + padded_hi)
