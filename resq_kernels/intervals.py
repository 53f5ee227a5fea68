"""Confidence intervals of means, by Student's t distribution."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and half the width of its interval; None of a single value, which has no interval."""

    mean: float
    half: float | None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of values and the interval around it.

    Formula: mean +- t s / sqrt(n), s^2 = sum((x - mean)^2) / (n - 1), t the quantile of Student's
    distribution of n - 1 degrees of freedom between whose signs lies the share `level`.

    It holds for values that are drawn independently of each other from one normal distribution.
    Means over the thousand targets of a window are nearly normal, but neighbouring windows may be
    of one article and so alike, which makes the interval somewhat too narrow; and it is about text
    like this one, not about other text. For a difference, give the differences of pairs: what the
    windows do to both sides alike cancels.

    Args:
        values: at least one.
        level: share of such intervals that contain the mean that is sought, in (0, 1).

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("mean_interval: values: expected at least one, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, t_quantile(level, len(values) - 1) * error)


@functools.cache
def t_quantile(level: float, degrees: int) -> float:
    """The t for which a Student variable lies in [-t, t] with probability `level`.

    Args:
        level: in (0, 1).
        degrees: of freedom, at least 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"t_quantile: level: expected a share in (0, 1), got {level}")
    if degrees < 1:
        raise ValueError(f"t_quantile: degrees: expected at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)), a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    total, term = 0.0, cosine if odd else 1.0
    for power in range(odd, degrees - 1, 2):  # cos^power and its coefficient
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
