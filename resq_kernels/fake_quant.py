"""Fake quantization: a loaded model computed in float32 from dequantized values.

Independent of the kernels: no integer product, no pages. The kernels must agree with it to float
rounding in one layer, and to 0.1 % in the perplexity of a model (`resq eval --fake-quant`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resq_kernels import reference
from resq_kernels.formats import MixedTensor, join_heads
from resq_kernels.nn.attention import ResQAttention, named_cache
from resq_kernels.nn.embedding import ResQEmbedding, TiedHead
from resq_kernels.nn.fused import FusedLinear
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.mlp import ResQMLP
from resq_kernels.nn.norm import ResQRMSNorm


@contextlib.contextmanager
def fake_quantized(model: nn.Module, rounding: Any = reference) -> Iterator[nn.Module]:
    """Inside the block, `model` computes in float32 with fake-quantized values.

    Activations: `reference.mixed_quantize`, dequantized. Linears: `F.linear` with
    `layer.dequantize()`. Keys and values: quantized and dequantized per token and head, then dense
    attention. A `DynamicCache` then holds these keys and values as floats.

    Args:
        model: a quantized model, or one of its modules.
        rounding: supplies `mixed_quantize`, `rms_norm_quantize`, `silu_mul_hadamard_quantize` and
            `kv_fake_quantize`; `testing.lockstep` passes functions that follow the kernels' codes.
    """
    faked = [module for module in model.modules() if type(module) in _FAKES]
    for module in faked:
        module.forward = functools.partial(_FAKES[type(module)], rounding, module)
    try:
        yield model
    finally:
        for module in faked:
            del module.forward


def _linear(rounding: Any, layer: ResQLinear, x: torch.Tensor | MixedTensor) -> torch.Tensor:
    dtype = layer.dtype if isinstance(x, MixedTensor) else x.dtype
    if not isinstance(x, MixedTensor):
        x = rounding.mixed_quantize(x, *layer.row_format)
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.dequantize(), layer.dequantize(), bias).to(dtype)


def _norm(
    rounding: Any, norm: ResQRMSNorm, x: torch.Tensor, residual: torch.Tensor | None = None
) -> MixedTensor | tuple[MixedTensor, torch.Tensor]:
    result = rounding.rms_norm_quantize(x, residual, norm.weight, norm.eps, *norm.row_format)
    return result[0] if residual is None else result


def _mlp(rounding: Any, mlp: ResQMLP, x: torch.Tensor | MixedTensor) -> torch.Tensor:
    hidden = rounding.silu_mul_hadamard_quantize(
        mlp.project(x), mlp.hadamard, *mlp.down_proj.row_format, mlp.hadamard_block
    )
    return mlp.down_proj(hidden)


def _attention(
    rounding: Any,
    attention: ResQAttention,
    hidden_states: torch.Tensor | MixedTensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention.kv_bits == 16:
        return ResQAttention.forward(
            attention, hidden_states, position_embeddings, attention_mask, cache, **kwargs
        )
    q, k, v = attention.project_heads(hidden_states)
    dtype, new = q.dtype, q.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    cos, sin = (t.float().unsqueeze(2) for t in attention.rope(*position_embeddings))
    q, k = (reference.apply_rope(x, cos, sin) for x in (q, k))
    if attention.key_rotation is not None:
        q, k = q @ attention.key_rotation.float(), k @ attention.key_rotation.float()
    k = rounding.kv_fake_quantize(k, attention.hi_bits).transpose(1, 2)
    v = rounding.kv_fake_quantize(v, attention.hi_bits).transpose(1, 2)
    cache = named_cache(cache, kwargs)
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    length = k.shape[2]
    visible = torch.ones(new, length, dtype=torch.bool, device=k.device).tril(length - new)
    if attention_mask is not None:
        # A padded query attends to itself, so that its row is finite; the row is not used.
        own = torch.eye(length, dtype=torch.bool, device=k.device)[-new:]
        visible = (visible & attention_mask[:, None, None].bool()) | own
    scale = attention.scaling
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, visible, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    return attention.o_proj(join_heads(out, attention.head_dim_hi).to(dtype)), None


def _embedding(
    rounding: Any, embedding: ResQEmbedding, ids: torch.Tensor, rotated: bool = False
) -> torch.Tensor:
    rows = reference.embedding(ids, *embedding.codes(), embedding.dtype)
    return rows if rotated else embedding.restored(rows)


def _tied_head(rounding: Any, head: TiedHead, x: torch.Tensor) -> torch.Tensor:
    return _linear(rounding, head.embedding, head.rotated(x))


_FAKES: dict[type[nn.Module], Callable[..., Any]] = {
    ResQLinear: _linear,
    FusedLinear: _linear,
    ResQEmbedding: _embedding,
    TiedHead: _tied_head,
    ResQRMSNorm: _norm,
    ResQMLP: _mlp,
    ResQAttention: _attention,
}
