"""GPTQ for a weight whose columns are 4-bit first and 8-bit last."""

from __future__ import annotations

import torch

from resq_kernels.formats import QuantizedWeight, pack_int4
from resq_kernels.weights import search_scale

BLOCK = 128


def gptq(weight: torch.Tensor, hessian: torch.Tensor, k_hi: int, damping: float) -> QuantizedWeight:
    """Rounds column by column; the columns not yet rounded absorb every error.

    Formula: with C the upper Cholesky factor of (E[x x^T] + damping * mean diagonal * I)^-1, for
    every column j in turn: e = (w_j - Q(w_j)) / C_jj, w_k -= e C_jk for k > j. The columns stand
    in ascending order of variance, so that the 8-bit columns, which are last, absorb the error of
    the 4-bit ones.

    Args:
        weight: float32 [N, K].
        hessian: E[x x^T] of the inputs as the kernel sees them, float64 [K, K]: the Hessian of the
            squared output error, up to a factor of 2.
        k_hi: number of 8-bit columns.
        damping: share of the mean diagonal that is added to it.

    Source: arXiv 2210.17323; mixed columns as in arXiv 2412.14363.
    """
    rows, columns = weight.shape
    k_lo = columns - k_hi
    scale = torch.stack(
        [search_scale(weight[:, :k_lo], 4), search_scale(weight[:, k_lo:], 8)], dim=1
    )
    factor = inverse_factor(hessian, damping).float()
    weight = weight.clone()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = weight[:, start:stop]
        errors = torch.empty_like(block)
        for j in range(start, stop):
            part, half = (0, 8) if j < k_lo else (1, 128)
            column = block[:, j - start]
            code = torch.round(column / scale[:, part]).clamp_(-half, half - 1)
            error = (column - code * scale[:, part]) / factor[j, j]
            block[:, j - start :] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
            codes[:, j] = code.to(torch.int8)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return QuantizedWeight(pack_int4(codes[:, :k_lo]), codes[:, k_lo:].contiguous(), scale)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float64 [K, K].

    An input that is always 0 gets diagonal 1: its weight has no effect.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
