"""ResQRMSNorm normalizes and quantizes in one pass, once for all linears that read the result;
FinalRMSNorm normalizes what the head reads, HeadNorm the heads of queries or keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resq_kernels import ops
from resq_kernels.formats import MixedTensor, RowFormat
from resq_kernels.head_norm import head_norm
from resq_kernels.nn.straight import StraightRows, needs_gradient, straight, straight_rows


class ResQRMSNorm(nn.Module):
    """mixed_quantize(x / sqrt(mean(x^2) + eps) * weight): input of q, k, v (or gate, up).

    Args:
        hidden_size: K.
        eps: added to the mean square.
        row_format: how the normalized rows are quantized.
        dtype, device: of the weight.

    Attributes:
        weight: [K] gain; ones after a rotation, which folds the gain into the next linears.
        gain_is_one: whether `pack` found ones. The kernel then reads no weight, which saves a pass
            over the row and gives the same bits. Loading a state looks again; what changes the
            weight in another way calls `pack`.

    Source: arXiv 2412.14363, section 4; folding of the gain as in SliceGPT and QuaRot.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        row_format: RowFormat,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.row_format = eps, row_format
        weight = torch.ones(hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.gain_is_one = False

    def pack(self) -> None:
        """Looks at the weight, which waits for its device."""
        self.gain_is_one = not self.weight.is_meta and bool((self.weight == 1).all())

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.gain_is_one:
            self.pack()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> MixedTensor | StraightRows | tuple[MixedTensor | StraightRows, torch.Tensor]:
        """x [..., K] -> codes and scales of the normalized rows; with the gradient by x, if x needs
        one.

        With a residual [..., K]: codes and scales of the normalized x + residual, and that sum in
        x's dtype.
        """
        if needs_gradient(x, residual, self.weight):
            total = x if residual is None else x + residual
            rows = self._straight(total)
            return rows if residual is None else (rows, total)
        quantized, new_residual = ops.rms_norm_quantize(
            x, residual, None if self.gain_is_one else self.weight, self.eps, *self.row_format
        )
        return quantized if residual is None else (quantized, new_residual)

    def _straight(self, x: torch.Tensor) -> StraightRows:
        # The weight goes to the operator even if it is ones, so that one in training is refused.
        codes = ops.rms_norm_quantize(x.detach(), None, self.weight, self.eps, *self.row_format)[0]
        exact = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return straight_rows(codes, exact)

    def extra_repr(self) -> str:
        columns = f"high_columns={self.row_format.k_hi}"
        return f"{self.weight.shape[0]}, eps={self.eps}, {columns}"


class FinalRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight of the states after the last layer: `ops.rms_norm`.

    transformers' own class takes eight operators for it, and its sums depend on the device.

    Args:
        weight: [K] gain, the parameter of the norm that this one replaces.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., K] in x's dtype; with the gradient by x and weight, if one needs it."""
        if not needs_gradient(x, self.weight):
            return ops.rms_norm(x, self.weight, self.eps)
        normed = ops.rms_norm(x.detach(), self.weight.detach(), self.eps)
        exact = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return straight(normed, exact.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class HeadNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight of every head: `head_norm`.

    Args:
        head_dim: D.
        eps: added to the mean square.
        dtype, device: of the weight.

    Attributes:
        weight: [D] gain, that of all heads.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        weight = torch.ones(head_dim, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] in x's dtype."""
        return head_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
