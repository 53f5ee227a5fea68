"""Types of command line values: a wrong one is a usage error (exit code 2) before anything runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(minimum: int) -> Callable[[str], int]:
    """A converter for whole numbers from `minimum` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}"
            )
        return value

    return convert


def real(low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """A converter for numbers in [low, high], or (low, high] with `open_low`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            bracket = "(" if open_low else "["
            raise argparse.ArgumentTypeError(
                f"expected a number in {bracket}{low:g}, {high:g}], got {text!r}"
            )
        return value

    return convert


def file(name: str) -> str:
    """A converter for a file to write; "-" is stdout."""
    return "/dev/stdout" if name == "-" else name
