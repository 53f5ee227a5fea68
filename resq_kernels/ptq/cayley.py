"""Descent on orthogonal matrices: steps by the Cayley transform."""

from __future__ import annotations

import torch


def block_mask(size: int, borders: set[int]) -> torch.Tensor:
    """Which entries of a matrix belong to its diagonal blocks: bool [size, size].

    Args:
        size: rows and columns.
        borders: where a block ends and the next begins; 0 and `size` need not be among them.
    """
    block = torch.zeros(size, dtype=torch.int64)
    for border in borders:
        block[border:] += 1
    return block[:, None] == block


def direction(gradient: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The skew-symmetric A of steepest ascent: U (I + s A) raises the loss fastest, s small.

    Formula: A = (G - G^T) / 2 inside the blocks, 0 outside.

    Args:
        gradient: G, that of the loss by D at D = 0, of U (I + D), float64 [..., n, n].
        mask: of `block_mask`.
    """
    return 0.5 * (gradient - gradient.mT) * mask


def step_size(ascent: torch.Tensor, rate: float) -> torch.Tensor:
    """min(rate, 1 / ||A||_1), [..., 1, 1]: no matrix turns by more than about a radian a step.

    Source: the fixed-point iteration of Li, Fuxin and Todorovic (arXiv 2002.01113, algorithm 1)
    needs such a bound; solved exactly, the transform does not, but the loss has changed by then.
    """
    norm = ascent.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
    return (1 / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(rate)


def cayley(ascent: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The orthogonal C that a matrix is multiplied by from the right to descend.

    Formula: C = (I + t/2 A)^-1 (I - t/2 A), orthogonal for every skew-symmetric A; it has A's
    blocks. I + t/2 A has no singular value below 1, so solving costs no digits: ||C^T C - I|| stays
    within rounding (tests/ptq/test_learn.py).

    Args:
        ascent: A of `direction`, float64 [..., n, n].
        size: t, [..., 1, 1].
    """
    eye = torch.eye(ascent.shape[-1], dtype=ascent.dtype, device=ascent.device)
    half = 0.5 * size * ascent
    return torch.linalg.solve(eye + half, eye - half)
