"""GPTQ for a weight whose columns are 4-bit first and 8-bit last."""

from __future__ import annotations

import torch

from resq_kernels import ops
from resq_kernels.formats import QuantizedWeight, pack_int4
from resq_kernels.ops.gptq_block import MAX_COLUMNS


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, k_hi: int, damping: float
) -> tuple[QuantizedWeight, torch.Tensor]:
    """Rounds column by column; every column makes up for the errors of those before it.

    Formula: E[x x^T] + damping * mean diagonal * I = V V^T with V upper triangular, so the output
    error is the sum over columns j of |sum_(i <= j) (w_i - q_i) V_ij|^2, and q_j = Q(w_j +
    sum_(i < j) (w_i - q_i) V_ij / V_jj). The columns stand in ascending order of variance, so that
    the 8-bit columns, which are last, make up for the 4-bit ones.

    A row's result depends on no other row, so weights that read the same input are rounded
    together, as one matrix of all their rows.

    Args:
        weight: float32 [N, K].
        hessian: E[x x^T] of the inputs as the kernel sees them, float64 [K, K]: the Hessian of the
            squared output error, up to a factor of 2.
        k_hi: number of 8-bit columns.
        damping: share of the mean diagonal that is added to it.

    Returns:
        The weight, and what its 8-bit columns were rounded from: float32 [N, k_hi], in steps of
        their scale.

    Source: arXiv 2210.17323, in the equivalent form of arXiv 2307.13304 (LDLQ), which needs no
    inverse; mixed columns as in arXiv 2412.14363.
    """
    rows, columns = weight.shape
    k_lo = columns - k_hi
    scales = ops.search_scale(weight[:, :k_lo], 4), ops.search_scale(weight[:, k_lo:], 8)
    feedback = feedback_factor(hessian, damping)
    # Transposed: a column of the weight is contiguous.
    weight = weight.T.contiguous()
    errors = torch.empty_like(weight)
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    exact = torch.empty(k_hi, rows, device=weight.device)
    for bits, part, first, last in ((4, scales[0], 0, k_lo), (8, scales[1], k_lo, columns)):
        for start in range(first, last, MAX_COLUMNS):
            stop = min(start + MAX_COLUMNS, last)
            own = weight[start:stop]
            targets = torch.addmm(own, feedback[:start, start:stop].T, errors[:start])
            within = feedback[start:stop, start:stop]
            codes[start:stop], errors[start:stop], rounded = ops.gptq_block(
                targets, own, within, part, bits
            )
            if bits == 8:
                exact[start - k_lo : stop - k_lo] = rounded
    codes, scale = codes.T.contiguous(), torch.stack(scales, dim=1)
    found = QuantizedWeight(pack_int4(codes[:, :k_lo]), codes[:, k_lo:].contiguous(), scale)
    return found, exact.T.contiguous()


def feedback_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """V_ij / V_jj, float32 [K, K], with V V^T the damped Hessian and V upper triangular.

    An input that is always 0 gets diagonal 1: its weight has no effect. Memory: two matrices of
    the Hessian's size besides it.

    Raises:
        ValueError: too little damping for the rounding errors of the Hessian.
    """
    # The lower factor of the matrix with rows and columns reversed is V reversed.
    damped = hessian.flip(0, 1)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    factor, info = torch.linalg.cholesky_ex(damped)
    if info:
        raise ValueError(
            f"gptq: damping: expected enough to make the Hessian positive definite, got {damping}"
        )
    del damped, diagonal
    factor /= factor.diagonal().clone()
    return factor.float().flip(0, 1)
