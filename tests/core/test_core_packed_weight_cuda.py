"""csrc/core/packed_weight_cuda.h: every code has its own place, where the tensor cores look for it.

The register tables below are those of the PTX ISA, written down independently of the layout:
lane = 4 g + i holds the A operand of mma.m16n8k64.s4 and of mma.m16n8k32.s8 in four registers.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest

LAYOUTS = ["MMA", "WGMMA"]
SHAPES = [(1, 2, 1), (64, 64, 32), (65, 66, 33), (17, 0, 40), (130, 130, 0), (3, 784, 112)]


def register_row_column(lane: int, register: int, element: int, elements: int) -> tuple[int, int]:
    """A operand of m16n8k(8 * elements): register 0..3, `elements` codes in each, lowest first."""
    g, i = lane // 4, lane % 4
    row = g if register in (0, 2) else g + 8
    column = i * elements + element + (4 * elements if register >= 2 else 0)
    return row, column


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_layouts_give_every_code_its_own_place(
    core: ModuleType, layout: str, shape: tuple[int, int, int]
) -> None:
    n, k_lo, k_hi = shape
    block_bytes = core.cuda_block_bytes(k_lo, k_hi)
    blocks = -(-n // 64)
    assert core.cuda_packed_weight_bytes(n, k_lo, k_hi) == blocks * block_bytes
    nibbles = set()
    k_lo_padded, k_hi_padded = -(-k_lo // 64) * 64, -(-k_hi // 64) * 64
    for row, column in itertools.product(range(64), range(k_lo_padded)):
        byte, high = core.cuda_lo_place(getattr(core.CudaLayout, layout), row, column)
        nibbles.add(2 * byte + high)
    for row, column in itertools.product(range(64), range(k_hi_padded)):
        byte = core.cuda_hi_byte(k_lo, row, column)
        nibbles |= {2 * byte, 2 * byte + 1}
    # As many places as nibbles, none outside: a bijection onto the block.
    assert nibbles == set(range(2 * block_bytes))
    assert 64 * (k_lo_padded + 2 * k_hi_padded) == 2 * block_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_lo_code_is_the_inverse_of_the_place(core: ModuleType, layout: str) -> None:
    kind = getattr(core.CudaLayout, layout)
    for lane, nibble in itertools.product(range(32), range(32)):
        row, column = core.cuda_lo_code(kind, lane, nibble)
        assert core.cuda_lo_place(kind, row, column) == (16 * lane + nibble // 2, nibble % 2 == 1)


def test_cuda_hi_code_is_the_inverse_of_the_byte(core: ModuleType) -> None:
    for lane, byte in itertools.product(range(32), range(16)):
        row, column = core.cuda_hi_code(lane, byte)
        assert core.cuda_hi_byte(0, row, column) == 16 * lane + byte


@pytest.mark.parametrize("strip", range(4))
def test_cuda_low_codes_of_kmma_are_registers_of_m16n8k64_s4(core: ModuleType, strip: int) -> None:
    for lane, register, nibble in itertools.product(range(32), range(4), range(8)):
        row, column = register_row_column(lane, register, nibble, 8)
        expected = 2048 * 3 + 512 * strip + 16 * lane + 4 * register + nibble // 2
        place = core.cuda_lo_place(core.CudaLayout.MMA, 16 * strip + row, 3 * 64 + column)
        assert place == (expected, nibble % 2 == 1)


@pytest.mark.parametrize("strip", range(4))
def test_cuda_low_codes_of_kwgmma_are_registers_of_m64k32_s8(core: ModuleType, strip: int) -> None:
    # A warp of wgmma holds the 16 rows of its strip as mma.m16n8k32 does. Word 2 s + h of a lane
    # has registers 2 h (high nibbles) and 2 h + 1 (low nibbles) of 32-column step s.
    for lane, register, byte, step in itertools.product(range(32), range(4), range(4), range(2)):
        row, column = register_row_column(lane, register, byte, 4)
        word = 2 * step + register // 2
        expected = 2048 * 5 + 512 * strip + 16 * lane + 4 * word + byte
        place = core.cuda_lo_place(
            core.CudaLayout.WGMMA, 16 * strip + row, 5 * 64 + 32 * step + column
        )
        assert place == (expected, register % 2 == 0)


@pytest.mark.parametrize("strip", range(4))
def test_cuda_high_codes_are_registers_of_m16n8k32_s8(core: ModuleType, strip: int) -> None:
    lo_bytes = core.cuda_block_bytes(96, 0)  # the low steps of a block come first
    assert lo_bytes == 2 * 2048
    for lane, register, byte in itertools.product(range(32), range(4), range(4)):
        row, column = register_row_column(lane, register, byte, 4)
        expected = lo_bytes + 2048 * 2 + 512 * strip + 16 * lane + 4 * register + byte
        assert core.cuda_hi_byte(96, 16 * strip + row, 2 * 32 + column) == expected
