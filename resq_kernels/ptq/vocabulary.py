"""The head of the float model; embedding and head of a quantized folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from resq_kernels import ops, reference
from resq_kernels.architecture import (
    EMBEDDING,
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD,
    HEAD_GAIN,
    HEAD_MODULE,
    ModelShape,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import PackedWeight, QuantizedWeight, RowFormat
from resq_kernels.ptq.source import SourceModel

LOGIT_ROWS = 256
"""Tokens whose logits are in memory at once: 156 MB each of two models for Qwen2.5."""


class FloatHead:
    """Final norm and head of the source.

    Args:
        model: the source.
        products: dtype of the head's products.
        device: where they are computed.

    Attributes:
        matrix: of the head, [vocabulary, hidden].
    """

    def __init__(self, model: SourceModel, products: torch.dtype, device: str) -> None:
        self._eps = model.shape.norm_eps
        self._gain = model.load(FINAL_NORM).to(device)
        self.matrix = model.load(model.head).to(device, products)

    def norm(self, states: torch.Tensor, back: torch.Tensor | None = None) -> torch.Tensor:
        """Of states after the last layer, float32 [..., hidden]; of those of a rotated model with
        `back`, U_A^T."""
        normed = reference.rms_norm(states, None, self._eps)
        return (normed if back is None else normed @ back) * self._gain

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Float32 [..., vocabulary] of what `norm` returns."""
        return functional.linear(normed.to(self.matrix.dtype), self.matrix).float()

    def mean_loss(
        self,
        states: torch.Tensor,
        of_rows: Callable[[torch.Tensor, slice], tuple[float, torch.Tensor]],
        back: torch.Tensor | None = None,
    ) -> tuple[float, torch.Tensor]:
        """The mean of a loss over tokens, and its gradient by their states; logits exist for
        `LOGIT_ROWS` tokens at a time.

        Args:
            states: float32 [tokens, hidden] after the last layer.
            of_rows: the sum of the losses of some tokens, and its gradient by their logits, of log
                probabilities [rows, vocabulary], which it may overwrite, and of which tokens.
            back: as in `norm`.
        """
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.norm(states, back)
        total, gradients = 0.0, []
        for first in range(0, len(states), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            logits = self.logits(normed.detach()[rows])
            loss, by_logits = of_rows(functional.log_softmax(logits, -1), rows)
            total += loss
            gradients.append((by_logits.to(self.matrix.dtype) @ self.matrix).float())
        normed.backward(torch.cat(gradients) / len(states))
        assert states.grad is not None
        return total / len(states), states.grad


class RoundedVocabulary:
    """Embedding, final norm and head of a quantized folder, by the operators that run them.

    Args:
        load: gives a tensor of the folder by its name, on the device where they are computed.
        shape: sizes of the source.
        config: how it was quantized.
        products: dtype of the head's products if it is not quantized.
    """

    def __init__(
        self,
        load: Callable[[str], torch.Tensor],
        shape: ModelShape,
        config: ResQConfig,
        products: torch.dtype,
    ) -> None:
        self._eps, self._gain = shape.norm_eps, load(FINAL_NORM).float()
        self._format = RowFormat(shape.hidden)
        self._turn: torch.Tensor | None = None
        self._embedding: torch.Tensor | PackedWeight
        self._head: torch.Tensor | PackedWeight
        if config.embedding_bits == 16:
            self._embedding, self._head = load(EMBEDDING), load(HEAD).to(products)
            return
        self._embedding = PackedWeight.pack(QuantizedWeight.read(load, EMBEDDING_MODULE))
        if not shape.tied:
            self._head = PackedWeight.pack(QuantizedWeight.read(load, HEAD_MODULE))
            return
        self._head = self._embedding
        if config.has_basis:
            self._turn = load(HEAD_GAIN).float()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding: int64 [...] -> float32 [..., hidden]."""
        rows = self._embedding
        if isinstance(rows, torch.Tensor):
            return rows[ids].float()
        return ops.embedding(ids, rows.data, rows.scale, rows.k_lo, rows.k_hi, torch.float32)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 [..., vocabulary] of states after the last layer."""
        normed, head = ops.rms_norm(states, self._gain, self._eps), self._head
        if isinstance(head, torch.Tensor):
            return functional.linear(normed.to(head.dtype), head).float()
        if self._turn is not None:
            normed = normed @ self._turn
        codes = ops.mixed_quantize(normed, *self._format)
        return ops.mixed_gemm(*codes, head.data, head.scale, head.sums, None, torch.float32)
