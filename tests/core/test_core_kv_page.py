"""The arithmetic of a KV page's ranges and codes, and what CUDA puts in place of its divisions."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

LARGEST = np.float32(65504)
LEVELS = (15, 255)
# Every finite float16 in order, as float32: -0 is left out.
HALVES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
ORDERED = np.concatenate([-HALVES[:0:-1], HALVES])


def floats_around_halves() -> np.ndarray:
    """Every float16, the middle to the next, and the float32 numbers next to both; random ones."""
    middles = (ORDERED[1:] + ORDERED[:-1]) / 2
    points = np.concatenate([ORDERED, middles, np.float32([-0.0])])
    around = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32)
    x = np.concatenate([points, *around, bits.view(np.float32)])
    return x[np.abs(x) <= LARGEST]


def test_half_below_and_half_above_are_the_nearest_on_their_side(core: ModuleType) -> None:
    """What rounding towards -infinity and +infinity gives."""
    x = floats_around_halves()
    below = core.half_below(x).view(np.float16).astype(np.float32)
    above = core.half_above(x).view(np.float16).astype(np.float32)
    assert (below == ORDERED[np.searchsorted(ORDERED, x, side="right") - 1]).all()
    assert (above == ORDERED[np.searchsorted(ORDERED, x, side="left")]).all()
    # The sign of a zero is that of the number, as IEEE 754 has it.
    assert (np.signbit(below) == np.signbit(x)).all()
    assert (np.signbit(above) == np.signbit(x)).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_quotient_by_levels_is_rounded_once(core: ModuleType, levels: int) -> None:
    """Every mantissa (other exponents scale it), and widths down to 0, where quotients lose bits"""
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    one = np.float32(1).view(np.uint32)
    largest = np.float32(2 * LARGEST).view(np.uint32)
    widths = np.random.default_rng(0).integers(0, largest + 1, 1_000_000, np.uint32)
    subnormal = np.random.default_rng(1).integers(0, 10 << 23, 1_000_000, np.uint32)
    bits = np.concatenate([mantissas + one, widths, subnormal, mantissas[: 1 << 16]])
    x = bits.view(np.float32)
    assert (core.cuda_quotient(x, levels, 0) == x / np.float32(levels)).all()


def test_inverse_of_every_scale_is_rounded_once(core: ModuleType) -> None:
    """Scales are float16 numbers / 4. The device's reciprocal may be off by a unit."""
    scale = HALVES[1:] / 4
    for units in (-1, 0, 1):
        assert (core.cuda_quotient(1.0, scale, units) == 1 / scale).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kv_code_rounds_half_to_even_and_clamps(core: ModuleType, levels: int) -> None:
    rng = np.random.default_rng(0)
    ties = np.arange(-8, 2 * levels + 8, dtype=np.float32) / 2
    random = rng.uniform(-2, levels + 2, 100_000).astype(np.float32)
    huge = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    ends = np.float32([-0.0, np.inf, -np.inf, np.nan, -np.nan])
    x = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), random, huge, ends])
    for offset, inverse in ((0.0, 1.0), (-3.5, 0.75), (1e-3, 3e4), (0.0, 0.0)):
        scaled = (x - np.float32(offset)) * np.float32(inverse)
        expected = np.where(np.isnan(scaled), 0, np.clip(np.rint(scaled), 0, levels))
        assert (core.kv_code(x, offset, inverse, levels) == expected).all(), (offset, inverse)


def test_inverse64_divides_all_numbers_of_32_bits(core: ModuleType) -> None:
    """Quotients grow with the dividend: multiples of the divisor and the numbers before decide."""
    last = 2**32 - 1
    rng = np.random.default_rng(0)
    for b in [*range(2, 300), 2**16, 2**31, last - 1, last, *rng.integers(2, last, 1000).tolist()]:
        inverse = core.cuda_inverse64(b)
        steps = rng.integers(0, last // b + 1, 20).tolist()
        for multiple in (b * step for step in [0, 1, last // b, *steps]):
            for a in (multiple - 1, multiple, min(multiple + b - 1, last)):
                assert a < 0 or a * inverse >> 64 == a // b, (a, b)


def test_divisors_divide_all_numbers_of_31_bits(core: ModuleType) -> None:
    last = 2**31 - 1
    rng = np.random.default_rng(1)
    for b in [*range(1, 300), 2**16, last - 1, last, *rng.integers(1, last, 1000).tolist()]:
        steps = rng.integers(0, last // b + 1, 20).tolist()
        for multiple in (b * step for step in [0, 1, last // b, *steps]):
            for a in (multiple - 1, multiple, min(multiple + b - 1, last)):
                assert a < 0 or core.cuda_divide(a, b) == a // b, (a, b)


def test_splits_are_a_function_of_what_a_row_sees(core: ModuleType) -> None:
    """Short rows have short splits, and at most 32 until splits are 1024 tokens long."""
    for visible, tokens in [(1, 256), (2048, 256), (2049, 512), (16384, 512), (16385, 1024)]:
        assert core.kv_split_tokens(visible) == tokens
    assert core.kv_split_count(-3) == core.kv_split_count(0) == 0
    for visible in [*range(1, 40000, 7), 131072, 2**20]:
        count = core.kv_split_count(visible)
        assert count == -(-visible // core.kv_split_tokens(visible))
        assert count <= max(32, -(-visible // 1024))


def test_states_of_kv_attention_do_not_grow_with_the_block_table(core: ModuleType) -> None:
    """A table of the lengths gives each row its splits, a wider one what the cache holds."""
    state = (128 + 4) * 4
    assert core.kv_state_capacity(1, 1, 4, 4) == 32  # one split
    assert core.kv_state_capacity(1, 1, 16, 16) == 4 * 32
    assert core.kv_state_capacity(1, 1, 512, 512) == 32 * 32
    # 64 sequences of 8k.
    needed, pages = 64 * 16 * 32, 64 * 128
    wide = [core.kv_state_capacity(64, 64, pages, 128 * times) for times in (1, 16, 1024)]
    assert needed <= wide[0] and wide[1] == wide[2] <= 2.1 * needed
    # A full H200, and prompts.
    assert core.kv_state_capacity(64, 64, 49152, 2048) * state <= 128 << 20
    assert core.kv_state_capacity(2048, 1, 49152, 2048) * state <= 128 << 20
