"""rms_norm_quantize: residual sum, RMSNorm and quantization. Shapes: ... any batch, K columns."""

from __future__ import annotations

import torch

from resq_kernels import _library
from resq_kernels.formats import MixedTensor
from resq_kernels.ops.mixed_quantize import mixed_outputs


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> tuple[MixedTensor, torch.Tensor]:
    """Adds the residual, normalizes each row and quantizes it, in one pass.

    Formula: h = x + residual, rounded to x's dtype; mixed_quantize(h / sqrt(mean(h^2) + eps) *
    weight), all of it in float32.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        residual: x's dtype and shape, or None.
        weight: float32, float16 or bfloat16 [K], or None for ones.
        eps: added to the mean square, 0 or more.
        n_hi, lo_bits, packed, symmetric, clip: as in `mixed_quantize`.

    Returns:
        (MixedTensor of the normalized rows, new_residual): new_residual is h, a new tensor of x's
        dtype and shape, or x itself when residual is None.

    Raises:
        RuntimeError: dtype or shape of x, residual or weight, or an option of `mixed_quantize`.

    Source: ResQ (arXiv 2412.14363) section 4.1; RMSNorm (arXiv 1910.07467) equation 4.
    """
    *quantized, new_residual = _library.call(
        torch.ops.resq.rms_norm_quantize.default,
        x,
        residual,
        weight,
        eps,
        n_hi,
        lo_bits,
        packed,
        symmetric,
        clip,
    )
    return MixedTensor(*quantized), x if residual is None else new_residual


@_library.register_fake("rms_norm_quantize")
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    new_residual = x.new_empty([0] if residual is None else x.shape)
    return (*mixed_outputs(x, x.shape[-1], n_hi, lo_bits, packed), new_residual)
