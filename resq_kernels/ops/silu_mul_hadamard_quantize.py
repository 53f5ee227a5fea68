"""silu_mul_hadamard_quantize: the input of down_proj. Shapes: ... any batch, K columns."""

from __future__ import annotations

import torch

from resq_kernels import _library
from resq_kernels.formats import MixedTensor
from resq_kernels.ops.mixed_quantize import mixed_outputs


def silu_mul_hadamard_quantize(
    gate_up: torch.Tensor,
    hadamard: bool = True,
    n_hi: int = 0,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> MixedTensor:
    """SwiGLU, the Hadamard transform of the whole row and its quantization, in one pass.

    Formula: mixed_quantize(H(silu(gate) * up)) with silu(g) = g / (1 + exp(-g)) and H as in
    `hadamard`, all of it in float32.

    Args:
        gate_up: float32, float16 or bfloat16 [..., 2 K], gate first, any strides.
        hadamard: False leaves H out; True needs a size K that `hadamard` takes.
        n_hi, lo_bits, packed, symmetric, clip: as in `mixed_quantize`.

    Returns:
        MixedTensor of rows of K columns.

    Raises:
        RuntimeError: dtype of gate_up, an odd last dimension, a size K without a Hadamard matrix,
            or an option of `mixed_quantize`.

    Source: ResQ (arXiv 2412.14363) section 4.2, the online rotation U_D before down_proj.
    """
    return MixedTensor(
        *_library.call(
            torch.ops.resq.silu_mul_hadamard_quantize.default,
            gate_up,
            hadamard,
            n_hi,
            lo_bits,
            packed,
            symmetric,
            clip,
        )
    )


@_library.register_fake("silu_mul_hadamard_quantize")
def _(
    gate_up: torch.Tensor,
    hadamard: bool = True,
    n_hi: int = 0,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mixed_outputs(gate_up, gate_up.shape[-1] // 2, n_hi, lo_bits, packed)
