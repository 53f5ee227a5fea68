"""DecodeStep: one token of every sequence, without transformers between the operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resq_kernels import ops
from resq_kernels.architecture import FAMILIES
from resq_kernels.nn.batch import AttentionMetadata
from resq_kernels.nn.decoder_layers import COLLECTORS, DecoderLayers
from resq_kernels.nn.hidden_basis import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from resq_kernels.nn.kv_cache import ResQCacheLayer

# Where classes come from whose `forward` computes what its name says.
KNOWN = ("transformers.models.", "torch.nn.modules.", "resq_kernels.nn.")
# Where hooks come from that a step from ids to logits has no need of.
IDLE = (COLLECTORS, "resq_kernels.nn.", "resq_kernels.integrations.transformers")


class DecodeStep:
    """The step of a `DecodeGraph`: embedding, all layers, last norm and head of a model.

    transformers asks anew in every pass which mask and positions it is given, turns positions into
    RoPE, and calls every layer, and `DecoderLayers` looks whether anything has changed: 1.1 of the
    3.8 ms of a step of SmolLM2-135M on two cores (docs/notes/0056). All of that is known
    beforehand here. On a CPU the layers are prepared too (`ops.decode_step`).

    Args:
        model: with a head.
        layers: of its decoder.
        paged: layers of the cache, which have room for `limit` columns.
        limit: columns, of which tables of RoPE are made.
        origin: metadata of a step at position 0 of every sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: DecoderLayers,
        paged: Sequence[ResQCacheLayer],
        limit: int,
        origin: AttentionMetadata,
    ) -> None:
        decoder: Any = model.base_model
        self._decoder, self._head, self._layers = decoder, model.lm_head, layers
        self._pages = [layer.paged.held() for layer in paged]
        pages, page_size = paged[0].paged.pages_per_sequence, paged[0].paged.page_size
        self._first_slots = origin.slots(pages * page_size)
        self._block_table = origin.block_table(pages)
        self._cu_seqlens_q = origin.cu_seqlens_q
        device = origin.positions.device
        ids = torch.zeros(len(origin.positions), 1, dtype=torch.int64, device=device)
        like = embedded(decoder, ids, None)
        positions = torch.arange(limit, device=device)[None]
        cos, sin = decoder.rotary_emb(like, position_ids=positions)
        # In float32, which the CPU's operators would turn them into at every step.
        self._cos, self._sin = cos[0].float(), sin[0].float()
        self._prepared: torch.Tensor | None = None
        if device.type == "cpu":
            tables = (self._cos.contiguous(), self._sin.contiguous())
            states = like.flatten(0, 1)
            self._prepared = layers.prepare_step(states, *tables, self._pages, self._block_table)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        paged: Sequence[ResQCacheLayer],
        limit: int,
        origin: AttentionMetadata,
    ) -> DecodeStep | None:
        """The step of a model, or None where the model is to be called (`layers_of`)."""
        layers = cls.layers_of(model)
        return None if layers is None else cls(model, layers, paged, limit, origin)

    @staticmethod
    def layers_of(model: PreTrainedModel) -> DecoderLayers | None:
        """The layers of a model whose step can be prepared, or None where something could see or
        change what modules compute: then the model is to be called."""
        if type(model).__name__ != f"{FAMILIES.get(model.config.model_type)}ForCausalLM":
            return None
        decoder: Any = model.base_model
        parts = (model, decoder, decoder.embed_tokens, decoder.norm, model.lm_head)
        return None if any(map(_is_watched, parts)) else DecoderLayers.of(decoder, {})

    def __call__(self, ids: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] in the model's dtype.

        Args:
            ids: int64 [B, 1], without padding.
            lens: int32 [B], tokens of every sequence before these; afterwards with them.
        """
        x = embedded(self._decoder, ids, None).flatten(0, 1)
        if self._prepared is None:
            hidden = self._through_layers(x, lens)
        else:
            hidden = ops.decode_step(self._prepared, x, lens)
        # Not by a call, in which hooks turn what others than the model give it.
        logits: torch.Tensor = self._head.forward(self._decoder.norm(hidden))
        return logits

    def _through_layers(self, x: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """What `ops.decode_step` computes, by launches that a graph can repeat."""
        positions, seq_lens = lens.long(), lens + 1
        hidden = self._layers.compute(
            x,
            self._cos.index_select(0, positions),
            self._sin.index_select(0, positions),
            self._pages,
            self._first_slots + positions,
            self._block_table,
            seq_lens,
            self._cu_seqlens_q,
        )
        lens.copy_(seq_lens)
        return hidden


def _is_watched(module: nn.Module) -> bool:
    """Whether a module does more than its class says, or is of a class that is not known."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    functions = (hook.func if isinstance(hook, partial) else hook for hook in hooks)
    homes = (str(getattr(function, "__module__", None)) for function in functions)
    foreign = any(not home.startswith(IDLE) for home in homes)
    return foreign or "forward" in vars(module) or not type(module).__module__.startswith(KNOWN)
