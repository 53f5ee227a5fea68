"""search_scale: the range of every row of a weight that its codes round best."""

from __future__ import annotations

import torch

from resq_kernels import _library


def search_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The symmetric scale of every row with the smallest rounding error.

    Formula: scale = min over range in {1.00, 0.99, ..., 0.21} of
    sum_k |w_k - s * clamp(rint(w_k / s))|^2.4 with s = range * max|w| / (2^(bits-1) - 1); the
    largest range wins a tie. The powers are computed within 1e-6, so that of two ranges whose
    errors differ by less either is found; the same one on every device.

    Args:
        weight: float32, float16 or bfloat16 [..., K].
        bits: 4 or 8.

    Returns:
        float32 [...]; 1 where a row is zero everywhere, NaN where it holds a NaN or an infinity, 0
        if K = 0. A row whose largest weight is below 2^-126 keeps its whole range.

    Raises:
        RuntimeError: a dtype or `bits` is not as above.

    Source: arXiv 2412.14363, whose code searches the range as GPTQ's and QuaRot's do.
    """
    scale: torch.Tensor = _library.call(torch.ops.resq.search_scale.default, weight, bits)
    return scale


@_library.register_fake("search_scale")
def _fake(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=torch.float32)
