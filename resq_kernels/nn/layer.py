"""Decoder layers of transformers with the first residual sum fused into the second norm."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from resq_kernels.architecture import FAMILIES
from resq_kernels.nn.batch import ForwardPass

CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
"""Layer of transformers -> what `quantized_class` has made of it."""


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


def quantized_class(kind: type[nn.Module]) -> type[nn.Module]:
    """What a decoder layer of transformers becomes: for `LlamaDecoderLayer` a class of this module
    named `ResQLlamaDecoderLayer`. A class outside of `FAMILIES` stays, whose own `forward` works as
    well.

    Classes are made when they are needed: to import the models of all families takes 7 ms each.
    """
    known = _layer_of(f"ResQ{kind.__name__}")
    if known is not kind:
        return kind
    if kind not in CLASSES:
        text = f"`{kind.__name__}` over quantized modules."
        own = {"__doc__": text, "__module__": __name__}
        CLASSES[kind] = type(f"ResQ{kind.__name__}", (_ResidualInNorm, kind), own)
    return CLASSES[kind]


def __getattr__(name: str) -> type[nn.Module]:
    """The class of that name, which a pickled layer refers to."""
    kind = _layer_of(name)
    if kind is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return quantized_class(kind)


def _layer_of(name: str) -> Any:
    """The layer of transformers that becomes the class of this name; None for other names."""
    theirs = name.removeprefix("ResQ")
    return None if theirs == name else family_class(theirs, "DecoderLayer")


def family_class(name: str, kind: str) -> Any:
    """The class of transformers that has this name, a prefix of `FAMILIES` and "DecoderLayer" or
    "ForCausalLM"; None for other names."""
    for model_type, prefix in FAMILIES.items():
        if name == f"{prefix}{kind}":
            module = f"transformers.models.{model_type}.modeling_{model_type}"
            return getattr(importlib.import_module(module), name)
    return None
