"""A row's (scale, zero, 1 / scale) as CUDA computes it without divisions, against divisions."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

FORMATS = [(4, False), (4, True), (8, False), (8, True)]
LARGEST = float(np.finfo(np.float32).max)


def all_ones(core: ModuleType, *row: object) -> np.ndarray:
    """Scales whose mantissa is all ones, the only ones that need the nearest reciprocal (as in
    test_core_cuda_hadamard.py)."""
    return ~core.row_scale(*row).view(np.int32) & 0x7FFFFF == 0


@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_every_mantissa_of_a_span(core: ModuleType, bits: int, symmetric: bool) -> None:
    """A power of two changes no mantissa; a reciprocal may be a unit in the last place off."""
    span = (np.arange(1 << 23, dtype=np.uint32) + 0x3F800000).view(np.float32)
    for units in (-1, 0, 1):
        same = core.cuda_same_scale(np.float32(0), span, bits, symmetric, units)
        assert (same | (units != 0) & all_ones(core, np.float32(0), span, bits, symmetric)).all()


@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_ranges_of_every_magnitude(core: ModuleType, bits: int, symmetric: bool) -> None:
    random = np.random.default_rng(0)
    magnitude = 2.0 ** random.uniform(-150, 127.99, 1 << 20)
    limits = [(magnitude * random.uniform(0, 1, 1 << 20)).astype(np.float32) for _ in range(2)]
    for low, high in (limits, (limits[0], 0 * limits[1]), (0 * limits[0], limits[1])):
        for units in (-1, 0, 1):
            same = core.cuda_same_scale(-low, high, bits, symmetric, units)
            assert (same | (units != 0) & all_ones(core, -low, high, bits, symmetric)).all()


@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_edges(core: ModuleType, bits: int, symmetric: bool) -> None:
    """Zeros of either sign, what is near the smallest scale, a span that overflows."""
    least = np.float32(2.0**-60)
    around = np.concatenate(
        [(least * n * (1 + np.arange(-9, 9) * 2.0**-24)) for n in range(1, 256)]
    )
    numbers = [0.0, -0.0, 1e-45, 1.0, 7.0, LARGEST, LARGEST / 2, *around.astype(np.float32)]
    numbers = np.array(numbers, dtype=np.float32)
    for other in (0.0, -0.0, 1e-45, 2.0**-60, 1.0, LARGEST):
        other = np.float32(other)
        assert core.cuda_same_scale(-numbers, abs(other), bits, symmetric, 0).all()
        assert core.cuda_same_scale(-abs(other), abs(numbers), bits, symmetric, 0).all()


def test_the_comparison_sees_a_wrong_reciprocal(core: ModuleType) -> None:
    span = (np.arange(1 << 16, dtype=np.uint32) + 0x3F800000).view(np.float32)
    assert not core.cuda_same_scale(np.float32(0), span, 4, False, 400_000).all()
