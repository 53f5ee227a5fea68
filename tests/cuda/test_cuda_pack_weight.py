"""pack_weight and unpack_weight on CUDA: the bytes of docs/formats.md section 3.3, and back."""

from __future__ import annotations

import pytest
import torch
from emulation import Emulated

from resq_kernels.formats import pack_int4, packed_weight_bytes, unpack_int4

# (N, K_lo, K_hi): one code, whole steps, padding of every kind, parts without columns.
WEIGHTS = [(1, 2, 1), (64, 128, 64), (65, 66, 33), (130, 784, 112), (17, 0, 40), (40, 96, 0)]


def random_codes(n: int, k_lo: int, k_hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    lo = torch.randint(-8, 8, (n, k_lo), dtype=torch.int8)
    return pack_int4(lo), torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)


def blocks(codes: torch.Tensor, step: int) -> torch.Tensor:
    """[N, K] padded -> [block, step, strip, half of the strip, g, column of the step]."""
    n, k = codes.shape
    padded = codes.new_zeros(-(-n // 64) * 64, -(-k // 64) * 64)
    padded[:n, :k] = codes
    sizes = (padded.shape[0] // 64, 4, 2, 8, padded.shape[1] // step, step)
    return padded.view(sizes).permute(0, 4, 1, 2, 3, 5)


def expected_bytes(arch: int, codes_lo: torch.Tensor, codes_hi: torch.Tensor) -> torch.Tensor:
    """The layout as a transposition: dimensions from the outermost to a nibble of a lane."""
    lo = blocks(unpack_int4(codes_lo), 64)  # b s strip half g column
    if arch == 80:  # column = 32 group + 8 i + nibble; word = half + 2 group
        lo = lo.unflatten(-1, (2, 4, 8)).permute(0, 1, 2, 4, 6, 5, 3, 7)
    else:  # column = 16 word + 4 i + byte; the low nibble is the lower half of the strip
        lo = lo.unflatten(-1, (4, 4, 4)).flip(3).permute(0, 1, 2, 4, 6, 5, 7, 3)
    hi = blocks(codes_hi, 32).unflatten(-1, (2, 4, 4)).permute(0, 1, 2, 4, 6, 5, 3, 7)
    lo_bytes = pack_int4(lo.flatten(-2)).flatten(1)
    hi_bytes = hi.flatten(1).view(torch.uint8)
    return torch.cat([lo_bytes, hi_bytes], dim=1).flatten()


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_pack_weight_writes_the_layout_and_unpack_weight_inverts_it(
    device: Emulated, weight: tuple[int, int, int]
) -> None:
    codes = random_codes(*weight)
    packed = device.pack_weight(*codes)
    assert torch.equal(packed, expected_bytes(device.arch, *codes))
    for back, code in zip(device.unpack_weight(packed, *weight), codes, strict=True):
        assert back.dtype == code.dtype
        assert torch.equal(back, code)


def test_weights_of_whole_blocks_are_the_packed_weight_of_all_their_rows(device: Emulated) -> None:
    rows, (k_lo, k_hi) = [128, 64, 37], (66, 33)
    parts = [random_codes(n, k_lo, k_hi) for n in rows]
    whole = device.pack_weight(*(torch.cat(codes) for codes in zip(*parts, strict=True)))
    assert torch.equal(torch.cat([device.pack_weight(*codes) for codes in parts]), whole)
    slices = whole.split([packed_weight_bytes(n, k_lo, k_hi, "cuda") for n in rows])
    for packed, codes in zip(slices, parts, strict=True):
        assert torch.equal(device.pack_weight(*codes), packed)


def test_pack_weight_shows_every_change_of_a_code(device: Emulated) -> None:
    codes_lo, codes_hi = random_codes(20, 70, 10)
    packed = device.pack_weight(codes_lo, codes_hi)
    codes_lo[19, 34] ^= 0x10
    assert (device.pack_weight(codes_lo, codes_hi) != packed).sum() == 1


@pytest.mark.parametrize("weight", [(0, 8, 8), (5, 0, 0)], ids=str)
def test_pack_weight_of_empty_sizes(device: Emulated, weight: tuple[int, int, int]) -> None:
    codes = random_codes(*weight)
    packed = device.pack_weight(*codes)
    assert packed.shape == (0,)
    for back, code in zip(device.unpack_weight(packed, *weight), codes, strict=True):
        assert back.shape == code.shape


def test_unpack_weight_refuses_a_weight_of_another_size(device: Emulated) -> None:
    message = r"unpack_weight: packed_weight: expected uint8 \[6144\] contiguous, got uint8 \[64\]"
    with pytest.raises(RuntimeError, match=message):
        device.unpack_weight(torch.zeros(64, dtype=torch.uint8), 64, 64, 32)
