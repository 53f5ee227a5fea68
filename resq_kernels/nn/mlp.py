"""ResQMLP: the SwiGLU MLP whose hidden state is rotated online and quantized to 4 bits."""

from __future__ import annotations

import torch

from resq_kernels import ops
from resq_kernels.formats import MixedTensor
from resq_kernels.nn.fused import FusesLinears
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.straight import StraightRows, needs_gradient, straight_rows, swiglu


class ResQMLP(FusesLinears):
    """down(quantize(H(silu(gate(x)) * up(x)))): SwiGLU, online Hadamard and quantization in one op.

    Args:
        gate_proj, up_proj: [I, K] linears that read the same rows; `fuse` makes one of them.
        down_proj: [K, I] linear.
        hadamard, hadamard_block: the transform of down_proj's input, as in
            `ops.silu_mul_hadamard_quantize`.

    Source: arXiv 2412.14363, section 4.2 (U_D).
    """

    FUSED = "gate_up_proj"
    PARTS = ("gate_proj", "up_proj")

    def __init__(
        self,
        gate_proj: ResQLinear,
        up_proj: ResQLinear,
        down_proj: ResQLinear,
        *,
        hadamard: bool,
        hadamard_block: int = 0,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.hadamard, self.hadamard_block = hadamard, hadamard_block

    def forward(self, x: torch.Tensor | MixedTensor | StraightRows) -> torch.Tensor:
        """[..., K] -> [..., K], in x's dtype, or the compute dtype for rounded rows; with the
        gradient by x, if x needs one."""
        gate_up, row_format = self.project(x), self.down_proj.row_format
        straight = needs_gradient(gate_up)
        codes = ops.silu_mul_hadamard_quantize(
            gate_up.detach() if straight else gate_up,
            self.hadamard,
            *row_format,
            self.hadamard_block,
        )
        hidden: MixedTensor | StraightRows = codes
        if straight:
            exact = swiglu(gate_up, self.hadamard, row_format.k_hi, self.hadamard_block)
            hidden = straight_rows(codes, exact)
        out: torch.Tensor = self.down_proj(hidden)
        return out

    def extra_repr(self) -> str:
        return f"hadamard={self.hadamard}, hadamard_block={self.hadamard_block}"
