"""unpack_weight inverts pack_weight, both ways, and refuses sizes that do not fit."""

from __future__ import annotations

import pytest
import torch

from resq_kernels import ops
from resq_kernels.formats import packed_weight_bytes

SHAPES = [
    (1, 2, 0),
    (17, 56, 8),
    (32, 224, 32),
    (33, 6, 3),
    (100, 3136, 448),
    (31, 0, 5),
    (0, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_weight_inverts_pack_weight(shape: tuple[int, int, int]) -> None:
    n, k_lo, k_hi = shape
    codes_lo = torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8)
    codes_hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
    got_lo, got_hi = ops.unpack_weight(ops.pack_weight(codes_lo, codes_hi), n, k_lo, k_hi)
    assert torch.equal(got_lo, codes_lo)
    assert torch.equal(got_hi, codes_hi)


def test_pack_weight_inverts_unpack_weight() -> None:
    shape = (64, 48, 16)  # no padding: every byte string is a packed weight
    packed = torch.randint(0, 256, (packed_weight_bytes(*shape),), dtype=torch.uint8)
    assert torch.equal(ops.pack_weight(*ops.unpack_weight(packed, *shape)), packed)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((33, 8, 8), r"packed_weight: expected uint8 \[768\] contiguous, got uint8 \[384\]"),
        ((32, 16, 8), r"packed_weight: expected uint8 \[512\] contiguous, got uint8 \[384\]"),
        ((32, 7, 8), r"n, k_lo, k_hi: expected none negative and k_lo even, got 32, 7, 8"),
        ((-1, 8, 8), r"n, k_lo, k_hi: expected none negative and k_lo even, got -1, 8, 8"),
    ],
)
def test_unpack_weight_refuses(shape: tuple[int, int, int], message: str) -> None:
    packed = torch.zeros(packed_weight_bytes(32, 8, 8), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="unpack_weight: " + message):
        ops.unpack_weight(packed, *shape)


def test_unpack_weight_passes_opcheck() -> None:
    packed = torch.randint(0, 256, (packed_weight_bytes(17, 56, 8),), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.resq.unpack_weight.default, (packed, 17, 56, 8))
