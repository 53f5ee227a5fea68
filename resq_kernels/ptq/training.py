"""What the trainings have in common: the order of windows, the loop, states to continue from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

STATE_SECONDS = 600.0
"""Seconds between two states from which an interrupted training continues."""
MEAN_OF = 8
"""Windows whose mean loss the progress bar shows."""


def passes(windows: int, count: int, seed: int) -> list[int]:
    """The window of every step of so many passes, each a permutation."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for _ in range(count) for i in torch.randperm(windows, generator=generator)]


def train(
    name: str,
    loss: str,
    order: Sequence[int],
    losses: list[float],
    step: Callable[[int, int], float],
    save: Callable[[], None],
    failure: str,
    progress: bool,
) -> None:
    """Takes the steps that are left, and appends to `losses` the loss before each.

    Args:
        name, loss: what the progress bar calls the training and its loss.
        order: the window of every step.
        losses: of the steps that were taken before.
        step: takes a step, of its number and window, and returns its loss.
        save: saves a state, with `losses`.
        failure: the error where a loss is not finite, with fields `loss` and `step`.
        progress: whether there is a progress bar.

    Raises:
        ValueError: a loss is not finite.
    """
    saved = time.monotonic()
    with tqdm(total=len(order), desc=name, unit="window", disable=not progress) as bar:
        bar.update(len(losses))
        for number in range(len(losses), len(order)):
            losses.append(step(number, order[number]))
            if not math.isfinite(losses[-1]):
                raise ValueError(failure.format(loss=losses[-1], step=number))
            bar.update()
            bar.set_postfix_str(f"{loss} {torch.tensor(losses[-MEAN_OF:]).mean():.3f}")
            if time.monotonic() - saved > STATE_SECONDS:
                save()
                saved = time.monotonic()
