"""DecodeStep: one token of every sequence, without transformers between the operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resq_kernels.architecture import FAMILIES
from resq_kernels.nn.decoder_layers import COLLECTORS, DecoderLayers
from resq_kernels.nn.hidden_basis import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from resq_kernels.nn.kv_cache import ResQCacheLayer

# Where classes come from whose `forward` computes what its name says.
KNOWN = ("transformers.models.", "torch.nn.modules.", "resq_kernels.nn.")


class DecodeStep:
    """The step of a `DecodeGraph`: embedding, all layers, last norm and head of a model.

    transformers asks anew in every pass which mask and positions it is given, turns positions into
    RoPE, and calls every layer, and `DecoderLayers` looks whether anything has changed: 1.1 of the
    3.8 ms of a step of SmolLM2-135M on two cores (docs/notes/0056). All of that is known
    beforehand here.

    Args:
        model: with a head.
        layers: of its decoder.
        paged: layers of the cache, which have room for `limit` columns.
        limit: columns, of which tables of RoPE are made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: DecoderLayers,
        paged: Sequence[ResQCacheLayer],
        limit: int,
    ) -> None:
        decoder: Any = model.base_model
        self._decoder, self._head, self._layers = decoder, model.lm_head, layers
        self._pages = [layer.paged.held() for layer in paged]
        first = paged[0].paged
        own, device = first.pages_per_sequence, self._pages[0].device
        batch = len(self._pages[0]) // own
        self._starts = torch.arange(batch, device=device) * own * first.page_size
        table = torch.arange(batch * own, dtype=torch.int32, device=device)
        self._block_table = table.view(batch, own)
        self._cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
        like = embedded(decoder, torch.zeros(1, 1, dtype=torch.int64, device=device), None)
        positions = torch.arange(limit, device=device)[None]
        cos, sin = decoder.rotary_emb(like, position_ids=positions)
        # In float32, which the CPU's operators would turn them into at every step.
        self._cos, self._sin = cos[0].float(), sin[0].float()
        if device.type == "cpu":
            layers.convert_once()

    @classmethod
    def of(
        cls, model: PreTrainedModel, paged: Sequence[ResQCacheLayer], limit: int
    ) -> DecodeStep | None:
        """The step of a model, or None where something could see or change what modules compute:
        then the model is to be called."""
        decoder: Any = model.base_model
        parts = (decoder.embed_tokens, decoder.norm, model.get_output_embeddings())
        name = f"{FAMILIES.get(model.config.model_type)}ForCausalLM"
        if type(model).__name__ != name or any(map(_is_watched, (model, decoder, *parts))):
            return None
        layers = DecoderLayers.of(decoder, {})
        return None if layers is None else cls(model, layers, paged, limit)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, seq_lens: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, vocabulary] in the model's dtype.

        Args:
            ids: int64 [B, 1].
            positions: int64 [B], of these tokens in their sequences.
            seq_lens: int32 [B], lengths after them.
        """
        hidden = self._layers.compute(
            embedded(self._decoder, ids, None).flatten(0, 1),
            self._cos.index_select(0, positions),
            self._sin.index_select(0, positions),
            self._pages,
            self._starts + positions,
            self._block_table,
            seq_lens,
            self._cu_seqlens_q,
        )
        # Not by a call, in which hooks turn what others than the model give it.
        logits: torch.Tensor = self._head.forward(self._decoder.norm(hidden))
        return logits


def _is_watched(module: nn.Module) -> bool:
    """Whether a module computes more than its class says, or something of ours does not know it."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    functions = (hook.func if isinstance(hook, partial) else hook for hook in hooks)
    homes = (str(getattr(function, "__module__", None)) for function in functions)
    foreign = any(not home.startswith((COLLECTORS, "resq_kernels.")) for home in homes)
    return foreign or "forward" in vars(module) or not type(module).__module__.startswith(KNOWN)
