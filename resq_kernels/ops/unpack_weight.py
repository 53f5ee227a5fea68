"""The layout of a packed weight -> canonical codes."""

from __future__ import annotations

import torch

from resq_kernels import _library


def unpack_weight(
    packed_weight: torch.Tensor, n: int, k_lo: int, k_hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse of `pack_weight` (docs/formats.md section 3.2).

    Args:
        packed_weight: uint8, one dimension, as `pack_weight` returned it for n, k_lo and k_hi on
            this kind of device.
        n: output rows.
        k_lo: 4-bit columns, even.
        k_hi: 8-bit columns.

    Returns:
        codes_lo uint8 [n, k_lo / 2] (even column in the low nibble) and codes_hi int8 [n, k_hi].

    Raises:
        RuntimeError: the size of `packed_weight` is not that of n, k_lo and k_hi, or one of these
            is negative, or k_lo is odd.
    """
    codes_lo, codes_hi = _library.call(
        torch.ops.resq.unpack_weight.default, packed_weight, n, k_lo, k_hi
    )
    return codes_lo, codes_hi


@_library.register_fake("unpack_weight")
def _fake(
    packed_weight: torch.Tensor, n: int, k_lo: int, k_hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    codes_lo = packed_weight.new_empty(n, k_lo // 2)
    return codes_lo, packed_weight.new_empty(n, k_hi, dtype=torch.int8)
