"""ResQAttention: grouped-query attention over keys and values that live in 4-bit pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from resq_kernels.formats import MixedTensor, join_heads
from resq_kernels.nn.batch import Batch, ForwardPass, apply_rope, rope_of
from resq_kernels.nn.fused import FusesLinears
from resq_kernels.nn.linear import ResQLinear, keep_dtype
from resq_kernels.nn.norm import HeadNorm
from resq_kernels.nn.paged import PagedKeysValues
from resq_kernels.nn.straight import StraightRows, needs_gradient
from resq_kernels.nn.straight import attention as straight_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.cache_utils import Cache


class ResQAttention(FusesLinears):
    """RoPE, key rotation, 4-bit keys and values, attention: with a cache and without one.

    Keys and values are quantized here, so every pass computes with the values that a cache would
    hold; without a cache the pages live only for the pass.

    Args:
        q_proj, k_proj, v_proj: [n_q D, K], [n_kv D, K], [n_kv D, K] linears that read the same
            rows; `fuse` makes one of them.
        o_proj: [K, n_q D] linear whose columns are ordered as in docs/formats.md section 6.
        head_dim: D, 64 or 128.
        layer_idx: index of this module's layer in the cache.
        kv_bits: 4, or 16 for keys and values that are not quantized.
        hi_bits: bits of the last eighth of a head: 8, or 4 for the uniform methods.
        rotated: whether keys are rotated, by `key_rotation`.
        q_norm, k_norm: norms of queries and keys before RoPE, in models that have them.
        turned: whether RoPE turns queries and keys.

    Attributes:
        key_rotation: float16 [1, D, D], or None; no `.to(dtype)` casts it.
        batch_invariant: False by default. True makes the bits of a query independent of the batch
            and of how a prompt is chunked on CUDA too, where long steps otherwise go through
            `prefill.attend`.

    Source: arXiv 2412.14363, section 4.2 (U_B, U_C) and 4.3 (KV cache).
    """

    FUSED = "qkv_proj"
    PARTS = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        q_proj: ResQLinear,
        k_proj: ResQLinear,
        v_proj: ResQLinear,
        o_proj: ResQLinear,
        *,
        head_dim: int,
        layer_idx: int,
        kv_bits: int = 4,
        hi_bits: int = 8,
        rotated: bool = True,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        turned: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm, self.k_norm, self.turned = q_norm, k_norm, turned
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.kv_bits, self.hi_bits = kv_bits, hi_bits
        self.scaling = head_dim**-0.5
        self.batch_invariant = False
        self.heads = q_proj.out_features // head_dim
        self.kv_heads = k_proj.out_features // head_dim
        # Every head keeps the same share of its dims in the high part of o_proj's input.
        self.head_dim_hi = o_proj.high_columns // self.heads
        self.key_rotation = None
        if rotated:
            # Not torch.eye, which takes 0.3 ms on the meta device: a model has one for every layer.
            eye = torch.zeros(1, head_dim, head_dim, dtype=torch.float16, device=device)
            eye.diagonal(dim1=1, dim2=2).fill_(1)
            self.key_rotation = nn.Parameter(eye, requires_grad=False)

    def forward(
        self,
        hidden_states: torch.Tensor | MixedTensor | StraightRows,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """[B, L, K] -> ([B, L, K], None): called as in a decoder layer of transformers.

        Args:
            hidden_states: [B, L, K], or the rounded rows of `ResQRMSNorm`.
            position_embeddings: (cos, sin), each [B or 1, L, D].
            attention_mask: [B, columns], true where a token is, or None. With kv_bits 16: what
                `scaled_dot_product_attention` takes.
            cache: a `ResQCache`, an empty `DynamicCache`, or None.
            forward_pass: shared by the layers of a pass; None if this layer is called on its own.
            kwargs: `past_key_values`, the name of `cache` before transformers 5.24; other arguments
                of decoder layers are ignored.

        Raises:
            ValueError: a mask of another shape, a cache of another kind, or a cache whose layers
                hold different columns, or one of 4-bit pages that holds tokens while a gradient is
                asked for.
            TypeError: a cache is passed under an unknown name.
        """
        cache = named_cache(cache, kwargs)
        q, k, v = self.project_heads(hidden_states)
        given = (q, k, v, *position_embeddings, attention_mask, cache)
        if self.kv_bits == 4:
            out = self._attend_pages(*given, forward_pass or ForwardPass())
        else:
            out = self._attend_float(*given)
        return self.o_proj(out), None

    def project_heads(
        self, hidden_states: torch.Tensor | MixedTensor | StraightRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., K] -> q [..., n_q, D], k and v [..., n_kv, D], normalized, before RoPE."""
        heads = self.project(hidden_states).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return q, k, v

    def rope(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`rope_of` this layer."""
        return rope_of(cos, sin, self.turned)

    def _attend_pages(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        forward_pass: ForwardPass,
    ) -> torch.Tensor:
        """[B, L, n_q D]; keys and values go through the pages of the cache or of this pass."""
        shape = (q.shape[0], q.shape[1])
        if cache is None:
            batch, paged = Batch(), PagedKeysValues()
        else:
            from resq_kernels.nn.kv_cache import paged_layer

            layer = paged_layer(cache, self.layer_idx)
            batch, paged = layer.batch, layer.paged
        given = (shape, mask, cos, sin, self.turned)
        if (straight := needs_gradient(q, k, v)) and paged.length:
            raise ValueError(
                "ResQAttention: cache: expected an empty one or None where a gradient is asked "
                f"for, got one with {paged.length} columns: its 4-bit pages pass none on to the "
                "tokens that they hold"
            )
        metadata = forward_pass.metadata(batch, paged.length, *given)
        exact = (q, k, v)
        if straight:
            q, k, v = (x.detach() for x in exact)
        q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
        rotated = paged.append(metadata, k_rows, v_rows, self.key_rotation, self.hi_bits, q_rows)
        batch.advance(metadata)
        assert rotated is not None  # queries were given
        out = paged.attend(
            metadata, rotated, self.scaling, q.dtype, self.head_dim_hi, self.batch_invariant
        )
        out = out.view(*shape, -1)
        if straight:
            out = straight_attention(out, rotated, exact, self, paged, metadata)
        return out

    def _attend_float(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """[B, L, n_q D] with 16-bit keys and values; the key rotation cancels and is left out."""
        rope = self.rope(cos, sin)
        q, k = (apply_rope(x, *rope).transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.scaling, enable_gqa=True
        )
        return join_heads(out.transpose(1, 2), self.head_dim_hi)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"kv_bits={self.kv_bits}, hi_bits={self.hi_bits}"
        )

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> ResQAttention:
        if recurse:
            for module in self.children():
                module._apply(fn)
        kept = () if self.key_rotation is None else (self.key_rotation,)
        apply: Callable[..., nn.Module] = super()._apply  # torch leaves it without types
        apply(keep_dtype(fn, *kept), False)
        return self


def named_cache(cache: Cache | None, kwargs: dict[str, object]) -> Cache | None:
    """The cache, under the name that this version of transformers uses.

    A cache overlooked among the ignored arguments would silently lose every token.
    """
    from transformers.cache_utils import Cache

    given = {name: value for name, value in kwargs.items() if isinstance(value, Cache)}
    old = given.pop("past_key_values", None)
    if given or (cache is not None and old is not None):
        names = sorted({*given, "cache", "past_key_values"})
        raise TypeError(
            "ResQAttention: expected one cache, named cache or past_key_values, got one "
            f"under {', '.join(given) or ' and '.join(names)}"
        )
    return old if cache is None else cache
