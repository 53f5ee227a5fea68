"""hadamard: the normalized Hadamard transform of rows. Shapes: ... any batch, n columns."""

from __future__ import annotations

import torch

from resq_kernels import _library


def hadamard(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Transforms the last dimension.

    Formula: y = scale * H x / sqrt(n), H = kron(H_m1, ..., H_2^a) with Paley factors m_i and
    Sylvester's matrix of the power of two inside (`resq_kernels.hadamard.matrix`), computed in
    float32 and rounded once to x's dtype.

    Args:
        x: float32, float16 or bfloat16 [..., n], any strides; n as `resq_kernels.hadamard.factors`
            takes it, which includes every intermediate size of Llama and Qwen2.5.
        scale: a factor on the result.

    Returns:
        A new contiguous tensor of x's dtype and shape.

    Raises:
        RuntimeError: dtype of x, or a size without a Hadamard matrix.

    Source: QuaRot (arXiv 2404.00456) section 3; matrices by Paley (1933) and Sylvester (1867).
    """
    y: torch.Tensor = _library.call(torch.ops.resq.hadamard.default, x, scale)
    return y


@_library.register_fake("hadamard")
def _(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return x.new_empty(x.shape)
