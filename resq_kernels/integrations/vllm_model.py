"""The quantized models as a model of vLLM, with 4-bit pages as its KV cache.

Modules, parameter names and numbers are those of `nn`, that transformers computes with. vLLM gives
the tokens of all requests in one row, and a place for every token in the cache.
Shapes: T tokens of all requests, n_q query and n_kv key/value heads of D dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import maybe_prefix
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from resq_kernels import checkpoint, ops
from resq_kernels.architecture import ModelShape
from resq_kernels.formats import join_heads
from resq_kernels.kv_pages import tile_tokens, token_bytes
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.batch import apply_rope
from resq_kernels.nn.convert import convert, pack
from resq_kernels.nn.hidden_basis import embedded
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.tensor_parallel import TensorParallel, check_degree, distribute

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class ResQForCausalLM(nn.Module):
    """A folder that `resq quantize` wrote, as vLLM runs it.

    Inside, hidden states are rotated (`nn.hidden_basis`); embeddings that a caller gives or gets
    are the float model's.

    Args:
        vllm_config: vLLM's options; `quant_config` is our `ResQVllmConfig`.
        prefix: of the names of the layers in vLLM.

    Raises:
        ValueError: an option that this model does not have.

    Source: arXiv 2412.14363.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.entry: dict[str, Any] = vllm_config.quant_config.entry
        self.folder = vllm_config.model_config.model
        options, tied_head, _ = stored = checkpoint.parse_quantization_config(self.entry)
        _check_options(vllm_config, options.kv_bits)
        config = vllm_config.model_config.hf_config
        with torch.device("meta"):
            inner: Any = AutoModelForCausalLM.from_config(
                config, dtype=vllm_config.model_config.dtype
            )
        convert(inner, options, tied_head, stored.has_basis, stored.has_linear_bases)
        # Its table is computed, not loaded: on the device that vLLM has made the default.
        inner.model.rotary_emb = type(inner.model.rotary_emb)(config)
        if inner.model.rotary_emb.rope_type in ("dynamic", "longrope"):
            raise ValueError(
                "ResQ: rope_type: expected one whose angles depend on the position alone, got "
                f"{inner.model.rotary_emb.rope_type!r}: they would depend on the requests beside it"
            )
        self.inner = inner
        self.shape = ModelShape.from_config(config.to_dict())
        self.parallel = None
        if (degree := vllm_config.parallel_config.tensor_parallel_size) > 1:
            check_degree(self.shape, options, degree)
            self.parallel = TensorParallel(get_tp_group().device_group)
            distribute(inner, self.parallel)
        kind = PagedAttention if options.kv_bits == 4 else FloatAttention
        layers = maybe_prefix(prefix, "model.layers")
        self.attention = nn.ModuleList(
            kind(layer.self_attn, f"{layers}.{index}.self_attn.attn", vllm_config)
            for index, layer in enumerate(inner.model.layers)
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The float model's embeddings [T, hidden] of ids [T]."""
        rows: torch.Tensor = self.inner.model.embed_tokens(input_ids)
        return rows

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head reads, [T, hidden], of ids [T] or embeddings [T, hidden] at positions [T].

        As in a transformers decoder, but that each sum of the residual stream is part of the norm
        that reads it; the bits are the same.
        """
        decoder = self.inner.model
        residual, x = embedded(decoder, input_ids, inputs_embeds), None
        cos, sin = (table[0] for table in decoder.rotary_emb(residual, positions[None]))
        for layer, attend in zip(decoder.layers, self.attention, strict=True):
            if x is None:
                normed = layer.input_layernorm(residual)
            else:
                normed, residual = layer.input_layernorm(x, residual)
            attention = layer.self_attn
            heads = attention.project_heads(normed)
            x = attention.o_proj(attend(*heads, *attention.rope(cos, sin)))
            normed, residual = layer.post_attention_layernorm(x, residual)
            x = layer.mlp(normed)
        states: torch.Tensor = decoder.norm(residual if x is None else residual + x)
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] of what `forward` returned."""
        # Not by a call: its hook would rotate, as for a caller of transformers' model.
        logits: torch.Tensor = self.inner.lm_head.forward(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes the tensors of a folder by their names (docs/formats.md section 6) and packs them.

        Every rank of tensor parallel reads all of them, and keeps its rows.

        Raises:
            CheckpointError: the folder is damaged or incomplete.
        """
        parameters = dict(self.inner.named_parameters())
        device = self.inner.model.rotary_emb.inv_freq.device
        names = set()
        for name, tensor in checkpoint.checked(weights, self.shape, self.entry, self.folder):
            owner, _, leaf = name.rpartition(".")
            module = self.inner.get_submodule(owner)
            if self.parallel is not None and isinstance(module, ResQLinear):
                tensor = tensor[self.parallel.share(len(tensor))]
            placed = nn.Parameter(tensor.to(device, parameters[name].dtype), requires_grad=False)
            setattr(module, leaf, placed)
            names.add(name)
        pack(self.inner)
        return names


def _check_options(vllm_config: VllmConfig, kv_bits: int) -> None:
    """Refuses what this model would otherwise not do as it was asked."""
    parallel = vllm_config.parallel_config
    checks: list[tuple[str, Any, Any]] = [
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1),
        ("runner", vllm_config.model_config.runner_type, "generate"),
    ]
    if kv_bits == 4:
        checks += [
            ("kv_cache_dtype", vllm_config.cache_config.cache_dtype, "auto"),
            ("kv_transfer_config", vllm_config.kv_transfer_config, None),
        ]
    for name, got, expected in checks:
        if got != expected:
            raise ValueError(
                f"ResQ: {name}: expected {expected!r} for a model with kv_bits={kv_bits} in vLLM, "
                f"got {got!r}"
            )
    if vllm_config.load_config.load_format == "dummy":
        raise ValueError("ResQ: load_format: expected one that reads weights, got 'dummy'")


class PagedAttention(nn.Module, AttentionLayerBase):
    """One layer's attention over 4-bit pages that vLLM allocates and hands out to requests.

    The numbers are those of transformers' model: `kv_attention` gives a query the same bits
    whatever the batch, the chunks of its prompt and the size of a page.

    Args:
        attention: the layer's module, for its sizes and its key rotation.
        name: of the layer in vLLM.
        vllm_config: vLLM's options.

    Source: arXiv 2412.14363, section 4.3; docs/formats.md section 5.
    """

    def __init__(self, attention: ResQAttention, name: str, vllm_config: VllmConfig) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple, so that it is not registered here too
        self.name = name
        self.num_heads = attention.heads
        self.kv_cache = torch.empty(0, dtype=torch.uint8)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """What tells vLLM about the pages."""
        return PagesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """88 or 160 bytes a token and head; vLLM plans its memory with them."""
        attention = self._attention[0]
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=attention.kv_heads,
            head_size=attention.head_dim,
            dtype=torch.uint8,
            state_content_bytes=token_bytes(attention.head_dim),
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Takes vLLM's memory, uint8 [pages, n_kv, tokens a page, bytes a token]."""
        self.kv_cache = kv_cache.view(*kv_cache.shape[:2], -1)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """o_proj's input [T, n_q D] of q [T, n_q, D], k and v [T, n_kv, D], cos and sin [T, D]."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory before there are pages
            return torch.zeros_like(q).flatten(1)
        batch: CommonAttentionMetadata = metadata[self.name]
        attention, slots = self._attention[0], batch.slot_mapping
        # vLLM may pad rows, not slots; a negative slot writes nothing.
        slots = nn.functional.pad(slots, (0, len(q) - len(slots)), value=-1)
        cache, rotation = self.kv_cache, attention.key_rotation
        rotated = ops.kv_append(k, v, cos, sin, rotation, cache, slots, attention.hi_bits, q)
        assert rotated is not None  # queries were given
        return ops.kv_attention(
            rotated,
            cache,
            batch.block_table_tensor,
            batch.seq_lens,
            batch.query_start_loc,
            attention.scaling,
            out_dtype=q.dtype,
            head_dim_hi=attention.head_dim_hi,
        )


class PagesBackend(AttentionBackend):
    """What vLLM asks about the pages of `PagedAttention`, which computes on its own."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's messages."""
        return "RESQ_PAGES"

    @staticmethod
    def get_impl_cls() -> NoReturn:
        """There is none: vLLM's attention layer, which would call it, is not used.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ResQ: attention over 4-bit pages is computed by PagedAttention")

    @staticmethod
    def get_builder_cls() -> type[PagesMetadataBuilder]:
        """Makes what `PagedAttention` finds in vLLM's forward context."""
        return PagesMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: FullAttentionSpec | None = None,
    ) -> list[MultipleOf]:
        """Whole tiles: 16 tokens at head_dim 128, 32 at 64."""
        return [MultipleOf(tile_tokens(64 if kv_cache_spec is None else kv_cache_spec.head_size))]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """One tensor a layer, and in a page one head after the other."""
        return (KVCacheLayout.LBHNC,)


class PagesMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Passes lengths, slots and block table on as vLLM has them: our operators take the same."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)  # abstract in the base class

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        """The metadata of a step, the same for all layers.

        Raises:
            ValueError: the attention is not causal.
        """
        if common_attn_metadata.causal is not True:
            raise ValueError(
                "ResQ: causal: expected True, got an attention without the causal mask"
            )
        return common_attn_metadata


class FloatAttention(nn.Module):
    """One layer's attention over vLLM's own cache, for folders with `kv_bits` 16.

    The key rotation cancels and is left out.

    Args:
        attention, name, vllm_config: as in `PagedAttention`.
    """

    def __init__(self, attention: ResQAttention, name: str, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.head_dim, self.head_dim_hi = attention.head_dim, attention.head_dim_hi
        self.attend = Attention(
            attention.heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=attention.kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=name,
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """As `PagedAttention.forward`."""
        q, k = (apply_rope(x[None], cos[None], sin[None])[0] for x in (q, k))
        out = self.attend(q.flatten(1), k.flatten(1), v.flatten(1))
        return join_heads(out.view(*q.shape), self.head_dim_hi)
