"""pack_weight: the bytes of docs/formats.md section 3.2, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from resq_kernels import ops
from resq_kernels.formats import packed_weight_bytes, unpack_int4

SHAPES = [
    (1, 2, 0),
    (17, 56, 8),
    (32, 224, 32),
    (33, 6, 3),
    (100, 3136, 448),
    (31, 0, 5),
    (0, 8, 8),
]


def random_codes(n: int, k_lo: int, k_hi: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes_lo = torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8, generator=generator)
    codes_hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8, generator=generator)
    return codes_lo, codes_hi


def packed_as_documented(codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    """The layout written with whole-tensor operations, from the text of the section alone."""
    n = codes_lo.shape[0]
    pad_n, pad_lo = -n % 32, -2 * codes_lo.shape[1] % 8
    lo = torch.nn.functional.pad(unpack_int4(codes_lo).int(), (0, pad_lo, 0, pad_n)) + 8
    hi = torch.nn.functional.pad(codes_hi.int(), (0, -codes_hi.shape[1] % 8, 0, pad_n)) + 128
    blocks = (n + pad_n) // 32
    # [block, row, group, half, j] -> [block, group, row, j], the second half in the high nibble
    lo = lo.view(blocks, 32, lo.shape[1] // 8, 2, 4).permute(0, 2, 1, 4, 3)
    lo = (lo[..., 0] + 16 * lo[..., 1]).reshape(blocks, lo.shape[1] * 128)
    hi = hi.view(blocks, 32, hi.shape[1] // 4, 4).transpose(1, 2)
    hi = hi.reshape(blocks, hi.shape[1] * 128)
    return torch.cat([lo, hi], dim=1).flatten().to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_weight_writes_the_documented_bytes(shape: tuple[int, int, int]) -> None:
    codes_lo, codes_hi = random_codes(*shape)
    packed = ops.pack_weight(codes_lo, codes_hi)
    assert packed.shape == (packed_weight_bytes(*shape),)
    if packed.numel():
        assert torch.equal(packed, packed_as_documented(codes_lo, codes_hi))


def test_pack_weight_gives_every_code_a_place_of_its_own() -> None:
    codes_lo, codes_hi = random_codes(3, 10, 5)
    packed = ops.pack_weight(codes_lo, codes_hi)
    places = set()
    for codes in (codes_lo, codes_hi):
        for index in range(codes.numel()):
            for bit in (1, 16) if codes is codes_lo else (1,):  # one code of the pair at a time
                codes.view(-1)[index] ^= bit
                changed = ops.pack_weight(codes_lo, codes_hi) ^ packed
                (byte,) = changed.nonzero().flatten().tolist()
                places.add((byte, changed[byte].item() > 15))
                codes.view(-1)[index] ^= bit
    assert len(places) == 3 * (10 + 5)


def test_pack_weight_result_does_not_depend_on_threads() -> None:
    codes = random_codes(100, 24, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = ops.pack_weight(*codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(single, ops.pack_weight(*codes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lo, hi: (lo.char(), hi), r"codes_lo: expected uint8 \[\*, \*\].*got int8 \[4, 6\]"),
        (lambda lo, hi: (lo, hi.byte()), r"codes_hi: expected int8 \[4, \*\].*got uint8 \[4, 3\]"),
        (lambda lo, hi: (lo, hi[:3]), r"codes_hi: expected int8 \[4, \*\].*got int8 \[3, 3\]"),
        (lambda lo, hi: (lo[0], hi), r"codes_lo: expected uint8 \[\*, \*\].*got uint8 \[6\]"),
        (lambda lo, hi: (lo[:, ::2], hi), r"codes_lo: .*got uint8 \[4, 3\] \(not contiguous\)"),
    ],
)
def test_pack_weight_refuses(change: object, message: str) -> None:
    with pytest.raises(RuntimeError, match="pack_weight: " + message):
        ops.pack_weight(*change(*random_codes(4, 12, 3)))


def test_pack_weight_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.resq.pack_weight.default, random_codes(17, 56, 8))
