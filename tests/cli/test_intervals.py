"""Intervals of means: quantiles of Student's t, and an interval computed by hand."""

from __future__ import annotations

import math

import pytest

from resq_kernels.intervals import mean_interval, t_quantile

# Of published tables, to the digits given here; also computed with 30 digits from the incomplete
# beta function.
QUANTILES = {
    (0.95, 1): 12.7062047,
    (0.95, 2): 4.3026527,
    (0.95, 3): 3.1824463,
    (0.95, 4): 2.7764451,
    (0.95, 9): 2.2621572,
    (0.95, 10): 2.2281389,
    (0.95, 30): 2.0422725,
    (0.95, 299): 1.9679297,
    (0.9, 5): 2.0150484,
    (0.99, 8): 3.3553873,
    (0.5, 1): 1.0,
}


@pytest.mark.parametrize(("level", "degrees"), QUANTILES)
def test_quantiles_are_those_of_the_tables(level: float, degrees: int) -> None:
    assert t_quantile(level, degrees) == pytest.approx(QUANTILES[level, degrees], abs=1e-6)


@pytest.mark.parametrize("degrees", [1, 2, 5, 12, 33])
def test_quantiles_enclose_their_share_of_the_density(degrees: int) -> None:
    """The density integrated by Simpson's rule from 0 to the quantile."""
    logs = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(logs) / math.sqrt(degrees * math.pi)
    t, steps = t_quantile(0.9, degrees), 2000
    heights = [
        (1 + (t * i / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)
    ]
    ends, odd, even = heights[0] + heights[-1], sum(heights[1:-1:2]), sum(heights[2:-1:2])
    inside = 2 * scale * (ends + 4 * odd + 2 * even) * t / steps / 3
    assert inside == pytest.approx(0.9, abs=1e-9)


def test_interval_is_that_of_the_textbook() -> None:
    # Mean 5; the squared deviations sum to 9 + 1 + 1 + 1 + 4 + 4 = 20; s = sqrt(20 / 5) = 2.
    found = mean_interval([2, 4, 4, 6, 7, 7])
    assert found.mean == 5.0
    assert found.half == pytest.approx(2.57058184 * 2 / math.sqrt(6), rel=1e-8)
    # Of two values: half their distance times 12.7.
    assert mean_interval([1.0, 3.0]) == (2.0, pytest.approx(12.7062047, rel=1e-8))


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert mean_interval([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"level: expected a share in \(0, 1\), got 1.0"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="degrees: expected at least 1, got 0"):
        t_quantile(0.95, 0)
