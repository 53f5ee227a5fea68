"""rms_norm: RMSNorm of rows in the model's dtype. Shapes: ... any batch, K columns."""

from __future__ import annotations

import torch

from resq_kernels import _library


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalizes each row: what the last norm of a model does, in one pass.

    Formula: x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once to x's dtype. The sum has
    the order of `rms_norm_quantize`, so that the result does not depend on batch or device.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        weight: float32, float16 or bfloat16 [K], or None for ones.
        eps: added to the mean square, 0 or more.

    Returns:
        A new contiguous tensor of x's dtype and shape.

    Raises:
        RuntimeError: dtype or shape of x or weight, or eps.

    Source: RMSNorm (arXiv 1910.07467) equation 4.
    """
    y: torch.Tensor = _library.call(torch.ops.resq.rms_norm.default, x, weight, eps)
    return y


@_library.register_fake("rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)
