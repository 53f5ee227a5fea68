"""The RMSNorm of each head's queries and keys that some models have before RoPE."""

from __future__ import annotations

import functools

import torch


def head_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, rounded once to x's dtype.

    Formula: in float32. The squares of one half of the columns are added to those of the other, and
    so on: an order that no batch and no device changes, as torch's sums on a GPU may.

    Args:
        x: [..., D].
        gain: [D].
        eps: added to the mean square.
    """
    exact = x.float()
    power = exact * exact
    while power.shape[-1] % 2 == 0:
        first, second = power.chunk(2, dim=-1)
        power = first + second
    total: torch.Tensor = functools.reduce(torch.add, power.split(1, dim=-1))
    return (exact / (total / x.shape[-1] + eps).sqrt() * gain.float()).to(x.dtype)
