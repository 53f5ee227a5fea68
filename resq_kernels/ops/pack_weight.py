"""Canonical weight codes -> the layout that the running device's `mixed_gemm` reads."""

from __future__ import annotations

import torch

from resq_kernels import _library
from resq_kernels.formats import packed_weight_bytes


def pack_weight(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    """Packs canonical codes for `mixed_gemm` (docs/formats.md sections 3.2, 3.3).

    Args:
        codes_lo: uint8 [N, K_lo / 2], packed signed 4-bit codes, even column in the low nibble.
        codes_hi: int8 [N, K_hi].

    Returns:
        uint8, one dimension of `formats.packed_weight_bytes(N, K_lo, K_hi, device type)` bytes; N,
        K_lo and K_hi are padded with code 0 (to multiples of 32, 8, 8 on the CPU, of 64 on CUDA).
        The layout belongs to the kind of device; use `unpack_weight` to move the codes to another
        kind.

    Raises:
        RuntimeError: a dtype or shape differs, or a tensor is not contiguous.
    """
    packed: torch.Tensor = _library.call(torch.ops.resq.pack_weight.default, codes_lo, codes_hi)
    return packed


@_library.register_fake("pack_weight")
def _fake(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    n, pairs = codes_lo.shape
    device = codes_lo.device.type
    return codes_lo.new_empty(packed_weight_bytes(n, 2 * pairs, codes_hi.shape[1], device))
