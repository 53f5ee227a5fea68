"""Canonical weight codes -> the layout that the running device's `mixed_gemm` reads."""

from __future__ import annotations

import torch

from resq_kernels.formats import packed_weight_bytes


def pack_weight(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    """Canonical codes in the order that `mixed_gemm` streams (docs/formats.md section 3.2).

    Args:
        codes_lo: uint8 [N, K_lo / 2], packed signed 4-bit codes, even column in the low nibble.
        codes_hi: int8 [N, K_hi].

    Returns:
        uint8, one dimension of `formats.packed_weight_bytes(N, K_lo, K_hi)` bytes; N is padded to
        a multiple of 32, K_lo and K_hi to multiples of 8, with code 0.

    Raises:
        RuntimeError: a dtype or shape differs, or a tensor is not contiguous.
    """
    return torch.ops.resq.pack_weight(codes_lo, codes_hi)


@torch.library.register_fake("resq::pack_weight")
def _fake(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    n, pairs = codes_lo.shape
    return codes_lo.new_empty(packed_weight_bytes(n, 2 * pairs, codes_hi.shape[1]))
