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
    hadamard_block: int = 0,
) -> MixedTensor:
    """SwiGLU, a Hadamard transform of its rows and their quantization, in one pass.

    Formula: mixed_quantize(H(silu(gate) * up)) with silu(g) = g / (1 + exp(-g)) and H as in
    `hadamard`, all of it in float32. H is that of the whole row, or in blocks: of every
    `hadamard_block` columns of the low part alone; then the high columns stay as they are.

    Args:
        gate_up: float32, float16 or bfloat16 [..., 2 K], gate first, any strides.
        hadamard: False leaves H out; True needs a size K that `hadamard` takes, or blocks.
        n_hi, lo_bits, packed, symmetric, clip: as in `mixed_quantize`.
        hadamard_block: columns of a block, a power of two from 8 to 256 that divides K - n_hi; 0:
            the whole row.

    Returns:
        MixedTensor of rows of K columns.

    Raises:
        RuntimeError: dtype of gate_up, an odd last dimension, a size K without a Hadamard matrix, a
            block that does not divide the low columns, or an option of `mixed_quantize`.

    Source: ResQ (arXiv 2412.14363) section 4.2, the online rotation U_D before down_proj. Blocks:
    docs/notes/0047.
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
            hadamard_block,
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
    hadamard_block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mixed_outputs(gate_up, gate_up.shape[-1] // 2, n_hi, lo_bits, packed)
