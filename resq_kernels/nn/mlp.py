"""ResQMLP: the SwiGLU MLP whose hidden state is rotated online and quantized to 4 bits."""

from __future__ import annotations

import torch
from torch import nn

from resq_kernels import ops
from resq_kernels.formats import MixedTensor
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.merged import MergedLinears


class ResQMLP(nn.Module):
    """down(quantize(H(silu(gate(x)) * up(x)))): SwiGLU, online Hadamard and quantization in one op.

    Args:
        gate_proj, up_proj: [I, K] linears that read the same rows.
        down_proj: [K, I] linear without a high part.
        hadamard: whether down_proj's columns were rotated by the Hadamard transform.

    Source: arXiv 2412.14363, section 4.2 (U_D).
    """

    def __init__(
        self, gate_proj: ResQLinear, up_proj: ResQLinear, down_proj: ResQLinear, *, hadamard: bool
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.hadamard = hadamard
        self._gate_up = MergedLinears()

    def merge(self) -> None:
        """Moves the weights of gate and up together, for one product (`MergedLinears`)."""
        self._gate_up.merge(self.gate_proj, self.up_proj)

    def forward(self, x: torch.Tensor | MixedTensor) -> torch.Tensor:
        """[..., K] -> [..., K], in x's dtype, or the compute dtype for a `MixedTensor`."""
        gate_up = self._gate_up(x, self.gate_proj, self.up_proj)
        down = self.down_proj
        hidden = ops.silu_mul_hadamard_quantize(
            gate_up,
            self.hadamard,
            down.high_columns,
            down.lo_bits,
            symmetric=down.symmetric,
            clip=down.clip,
        )
        out: torch.Tensor = down(hidden)
        return out

    def extra_repr(self) -> str:
        return f"hadamard={self.hadamard}"
