"""gptq_block: a block of a weight's columns, each of which makes up for the errors before it."""

from __future__ import annotations

import torch

from resq_kernels import _library

MAX_COLUMNS = 32
"""Columns of a block, as in csrc/ops/gptq_block/gptq_block.h."""


def gptq_block(
    targets: torch.Tensor,
    weight: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds columns of a weight one after another, each with the errors of those before it added.

    Formula, for every row and j = 0, 1, ..., half = 2^(bits - 1): x_j = (targets_j +
    sum_(i < j) feedback_ij e_i) / scale; c_j = rint(clamp(x_j, -half, half - 1));
    e_j = w_j - c_j scale. In float32, i ascending, each operation rounded: the same bits on every
    device.

    Args:
        targets: float32 [C, N], C <= `MAX_COLUMNS` columns of N rows: the weight, with what earlier
            blocks feed back.
        weight: float32 [C, N], what the errors are counted from.
        feedback: float32 [C, C], of which i < j are read.
        scale: float32 [N], of the rows.
        bits: 4 or 8.

    Returns:
        (codes int8, errors e float32, exact x float32), each [C, N]. Of a NaN the code is -half.

    Raises:
        RuntimeError: a shape, dtype, device or `bits` is not as above.

    Source: arXiv 2210.17323, in the form of arXiv 2307.13304 (LDLQ).
    """
    codes, errors, exact = _library.call(
        torch.ops.resq.gptq_block.default, targets, weight, feedback, scale, bits
    )
    return codes, errors, exact


@_library.register_fake("gptq_block")
def _fake(
    targets: torch.Tensor, *arguments: object, **named: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(targets, dtype=torch.int8, memory_format=torch.contiguous_format)
    errors, exact = (targets.new_empty(targets.shape) for _ in range(2))
    return codes, errors, exact
