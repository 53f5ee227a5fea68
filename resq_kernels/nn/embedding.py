"""The embedding, and the lm_head tied to it, in 8 bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from resq_kernels import ops
from resq_kernels.nn.hidden_basis import HiddenBasis, remember
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.weight_view import WeightView

# From this many rows on a CPU multiplies faster in float32, though it has to convert both factors:
# without instructions for 16-bit floats torch takes row by row (512 rows of 576 on two Zen 3 cores:
# 21.8 ms in bfloat16, 15.7 in float16, 2.5 in float32; 16 rows 0.69, 0.58 and 0.25).
_FLOAT32_ROWS = 16


class ResQEmbedding(ResQLinear):
    """Looks up rows of a quantized matrix [vocabulary, hidden]; a tied head multiplies by it.

    Parameters, packing and state are those of `ResQLinear`; all columns are INT8.

    Args:
        vocabulary, hidden: rows and columns.
        basis: of a rotated model, whose matrix is E U_A; None if the matrix is E.
        dtype: compute dtype, of the result.
        device: where the parameters are made.
    """

    takes_rotated = True

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        basis: HiddenBasis | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(hidden, vocabulary, high_columns=hidden, dtype=dtype, device=device)
        self.basis = basis

    def forward(self, ids: torch.Tensor, rotated: bool = False) -> torch.Tensor:
        """scale * code of the rows `ids` int32 or int64 [...]: those of E, or of E U_A if
        `rotated`, in the compute dtype [..., hidden].

        Raises:
            RuntimeError: not packed, or an id is out of range (`ops.embedding`).
            ValueError: rows of E, and the checkpoint does not hold the basis.
        """
        rows = self.stored(ids)
        return rows if rotated else self.restored(rows)

    def stored(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix that is stored, as `forward` returns them."""
        data, scale, _, k_lo, k_hi = self.packed()
        return ops.embedding(ids, data, scale, k_lo, k_hi, self.dtype)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of E from rows of the matrix that is stored."""
        return rows if self.basis is None else remember(self.basis.restore(rows), rows)


class TiedHead(nn.Module):
    """logits = (x G) E^T: the head of a model that ties it to the embedding E.

    With a rotation U of the hidden states and the gain g of the final norm, the embedding becomes
    E U and the head E diag(g) U: two matrices. G = U^T diag(g) U [hidden, hidden] turns one into
    the other, E diag(g) U = (E U) G, so that the vocabulary is stored and read once.

    Args:
        embedding: E, whose packed weight is also the head's; it stays a module of its owner alone.
        rotated: whether there is a G; without a rotation the norm keeps its gain.

    Attributes:
        gain: G [hidden, hidden] in the compute dtype, symmetric; or None.
    """

    def __init__(self, embedding: ResQEmbedding, rotated: bool) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not registered here too
        self.gain: nn.Parameter | None = None
        if rotated:
            device = embedding.weight_scale.device
            eye = torch.eye(embedding.in_features, dtype=embedding.dtype, device=device)
            self.gain = nn.Parameter(eye, False)

    @property
    def embedding(self) -> ResQEmbedding:
        """The module whose weight this is."""
        return self._embedding[0]

    @property
    def weight(self) -> WeightView:
        """Shape, dtype and device of the embedding's matrix, without values."""
        return self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of x [..., hidden], in x's dtype."""
        # With layers on several GPUs the embedding may be on another one than the last layer.
        device = self.embedding.packed().data.device
        return ResQLinear.forward(self.embedding, self.rotated(x).to(device))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """x G, the input that the embedding's matrix is multiplied with."""
        if self.gain is None:
            return x
        if x.device.type == "cpu" and x.numel() >= _FLOAT32_ROWS * x.shape[-1]:
            return F.linear(x.float(), self.gain.float()).to(x.dtype)
        return F.linear(x, self.gain)
