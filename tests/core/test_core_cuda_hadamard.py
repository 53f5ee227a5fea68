"""Where a CUDA block keeps the row that it transforms, and the quotient of silu: what they do
without a division, against divisions."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from test_core_hadamard import MODEL_SIZES, factors

# Half a row of this many floats fills the shared memory of a block of any device.
MOST_FLOATS = 58112


def layouts(core: ModuleType) -> Iterator[object]:
    """Those of small sizes and of models and their shards, whole and split."""
    sizes = {n for n in range(1, 1201) if factors(n)}
    sizes |= {n // shards for n in MODEL_SIZES for shards in (1, 2, 4, 8)}
    for n in sorted(sizes):
        if n <= MOST_FLOATS:
            yield core.HadamardLayout(n, False), 8
        if factors(n)[-1] % 2 == 0 and n % 8 == 0:
            yield core.HadamardLayout(n, True), 4


def test_quotients_by_inverses(core: ModuleType) -> None:
    """Every dividend and divisor below 2^16; 2^16 itself is where the proof ends."""
    assert core.cuda_wrong_divisors(1 << 16) == []
    assert core.cuda_wrong_divisors(1 << 18) != []  # the check finds divisors that are too large


def test_places(core: ModuleType) -> None:
    """e + e // block * pad: rising, inside the row's memory, runs whole and aligned."""
    checked = 0
    for layout, run in layouts(core):
        padded = -(-layout.n // 8) * 8
        e = np.arange(padded)
        places = layout.places(padded)
        assert (places == e + e // layout.block * layout.pad).all(), layout.n
        assert (np.diff(places) > 0).all() and 4 * (places[-1] + 1) <= layout.row_bytes
        runs = places.reshape(-1, run)
        assert (runs == runs[:, :1] + np.arange(run)).all() and not (runs[:, 0] % 4).any(), layout.n
        checked += 1
    assert checked > 300


def test_columns(core: ModuleType) -> None:
    """Column q of an axis, and its floats place(stride) apart, for every axis of a transform."""
    for layout, run in layouts(core):
        places = layout.places(layout.n)
        # Stages of two: a pass of more has the same strides and fewer columns.
        powers = [1 << i for i in range(2, 17) if run <= 1 << i < layout.power]
        for order, stride in [*layout.axes, *((2, stride) for stride in powers)]:
            q = np.arange(layout.n // order)
            first = q // stride * (order * stride) + q % stride
            columns = layout.columns(order, stride)
            assert (columns == places[first]).all(), (layout.n, order, stride)
            floats = columns[:, None] + np.arange(order) * places[stride]
            assert (floats == places[first[:, None] + np.arange(order) * stride]).all()


def gates() -> np.ndarray:
    """All bfloat16 and float16 numbers, and random float32 ones of every exponent."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    rng = np.random.default_rng(0)
    return np.concatenate(
        [
            (bits << 16).view(np.float32),
            bits.astype(np.uint16).view(np.float16).astype(np.float32),
            rng.integers(0, 1 << 32, 500_000, np.uint32).view(np.float32),
            rng.uniform(-83, 83, 500_000).astype(np.float32),
        ]
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_quotient_of_silu_is_rounded_once(core: ModuleType) -> None:
    """x / (1 + e^-x) as a division rounds it, for every reciprocal that a device may give: within a
    unit in the last place (the PTX manual). Divisors next to 1 + e^-x too, since e^-x is rounded.

    A divisor whose mantissa is all ones needs the nearest reciprocal. __fdiv_rn, which the CUDA
    manual says is rounded once, has the same instructions and no test for it: devices give that."""
    x = gates()
    assert not core.cuda_has_plain_quotient(x[~np.isfinite(x) | (x == 0)]).any()
    plain = core.cuda_has_plain_quotient(x)
    assert (plain == ((np.abs(x) > 2.0**-96) & (np.abs(x) < 83))).all()
    x = x[plain]
    divisor = (1 + np.exp(-x.astype(np.float64))).astype(np.float32)
    assert divisor.max() < 2.0**120
    for step in (-1, 0, 1):
        d = np.maximum((divisor.view(np.int32) + step).view(np.float32), np.float32(1))
        all_ones = ~d.view(np.int32) & 0x7FFFFF == 0
        assert all_ones.mean() < 0.5
        expected = x / d
        for units in (-1, 0, 1):
            same = core.cuda_quotient(x, d, units).view(np.int32) == expected.view(np.int32)
            assert (same | (units != 0) & all_ones).all(), (step, units)


def test_quotient_needs_its_limits(core: ModuleType) -> None:
    """What has_plain_quotient leaves out is wrong somewhere."""
    one = np.float32(1)
    assert np.signbit(np.float32(-0.0) / 2) and not np.signbit(core.cuda_quotient(-0.0, 2, 0))
    assert np.isnan(core.cuda_quotient(np.inf, one, 0))
    x = (np.arange(1, 1 << 16, dtype=np.uint32)).view(np.float32)
    assert (core.cuda_quotient(x, 1.75, 0) != x / np.float32(1.75)).any()
