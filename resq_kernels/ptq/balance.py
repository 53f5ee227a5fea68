"""Invertible changes inside a layer that cost nothing at run time and shrink rounding errors.

The noise of a quantized activation grows with the size of all channels that share its scale, and
reaches the output through the weights that read it. For a channel of mean square a_i read by
weights of power b_i, multiplied by s_i (and the weights divided by it), the output noise is
proportional to sum_i(s_i^2 a_i) * sum_i(b_i / s_i^2), smallest at s_i^2 = sqrt(b_i / a_i)
(Cauchy-Schwarz); the noise of the rounded weights grows by the same product. Such a factor can be
multiplied into the weights before and after wherever the path between them is linear:

* up_proj rows, down_proj columns: per channel;
* k_proj rows, q_proj rows: per rotary pair (a common factor of a pair commutes with RoPE);
* v_proj rows, o_proj columns: per kv head even by a matrix (attention mixes tokens, not channels).
"""

from __future__ import annotations

import torch

# Keeps every factor within what the calibration can know: this share of the mean is added to every
# power.
FLOOR = 1e-3


def channel_factors(activation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """s with s^2 = sqrt(weight / activation), geometric mean 1, per last dimension.

    Args:
        activation: mean squares of the channels, float64 [..., K].
        weight: powers of the weights that read them, float64 [..., K].
    """
    a, b = _floored(activation), _floored(weight)
    log = (b.log() - a.log()) / 4
    return (log - log.mean(-1, keepdim=True)).exp()


def balancing(
    moment: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """M, its inverse and sigma, ascending: M^T moment M = M^-1 gram M^-T = diag(sigma).

    Formula: moment = L L^T, L^T gram L = V diag(sigma^2) V^T, M = L^-T V diag(sigma)^(1/2). It is
    the change of basis x -> x M, W -> W M^-T that minimises tr(moment') tr(gram').

    Args:
        moment: E[x x^T], float64 [..., K, K].
        gram: W^T W of the weights that read x, float64 [..., K, K].
    """
    moment, gram = _regularised(moment), _regularised(gram)
    factor = torch.linalg.cholesky(moment)
    squares, vectors = torch.linalg.eigh(factor.mT @ gram @ factor)
    sigma = squares.sqrt()
    root = sigma.sqrt().unsqueeze(-2)
    matrix = torch.linalg.solve_triangular(factor.mT, vectors * root, upper=True)
    return matrix, (vectors / root).mT @ factor.mT, sigma


def _floored(power: torch.Tensor) -> torch.Tensor:
    mean = power.mean(-1, keepdim=True)
    return torch.where(mean > 0, power.clamp_min(0) + FLOOR * mean, 1.0)


def _regularised(matrix: torch.Tensor) -> torch.Tensor:
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return matrix + torch.where(mean > 0, FLOOR * mean, 1.0) * eye
