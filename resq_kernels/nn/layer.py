"""Decoder layers of transformers with the first residual sum fused into the second norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from resq_kernels.nn.batch import ForwardPass


class _ResidualInNorm:
    """Computes x + attention(norm(x)) and its norm in one pass instead of two.

    The bits are the same: `rms_norm_quantize` also rounds the sum to the dtype of the hidden
    states. The norm of the next layer could absorb the second sum in the same way, but a layer
    hands the next one a single tensor.
    """

    # Attributes of the decoder layers of transformers.
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, L, K] -> [B, L, K]; called like the transformers layer that it replaces."""
        forward_pass: ForwardPass | None = kwargs.get("forward_pass")
        if forward_pass is not None and forward_pass.layers is not None:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            given = (position_embeddings, attention_mask, cache, forward_pass)
            states = forward_pass.layers.hidden_states(self, hidden_states, *given)
            if states is not None:
                return states
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, **kwargs
        )
        normed, residual = self.post_attention_layernorm(attended, hidden_states)
        out: torch.Tensor = residual + self.mlp(normed)
        return out


class ResQLlamaDecoderLayer(_ResidualInNorm, LlamaDecoderLayer):
    """`LlamaDecoderLayer` over quantized modules."""


class ResQQwen2DecoderLayer(_ResidualInNorm, Qwen2DecoderLayer):
    """`Qwen2DecoderLayer` over quantized modules."""


CLASSES = {LlamaDecoderLayer: ResQLlamaDecoderLayer, Qwen2DecoderLayer: ResQQwen2DecoderLayer}
"""Layer of transformers -> what it becomes; another layer's own `forward` works as well."""
