"""decoder_layers: all decoder layers of a pass by one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_kernels import _library

LAYER_WEIGHTS = 19
"""Entries of `weights` for every layer, as in csrc/ops/decoder_layers/decoder_layers.h."""


def decoder_layers(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    eps: float,
    scale: float,
    n_hi: Sequence[int],
    clip: Sequence[float],
    lo_bits: int = 4,
    symmetric: bool = False,
    hi_bits: int = 8,
    hadamard: bool = True,
    hadamard_block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All decoder layers of Llama or Qwen2 one after another: what a pass computes between the
    embedding and the last norm.

    Formula, for every layer and its cache, x = out and r = residual of the layer before, r = 0 in
    the first one:
    r = r + x; q, k, v = W_qkv norm_1(r); a = kv_attention(kv_append(q, k, v));
    r = r + W_o mixed_quantize(a); out = W_down silu_mul_hadamard_quantize(W_gate_up norm_2(r)),
    residual = r. W x is `mixed_gemm`, norm is `rms_norm_quantize`. The bits are those of these
    operators called one by one; what is gained is the time between the calls (on a CPU a third of
    the step of a small model: docs/notes/0046).

    Args:
        x: float32, float16 or bfloat16 [T, hidden], hidden states of the new tokens of all
            sequences; every linear returns this dtype.
        cos, sin: [T, D] as in `kv_append`.
        caches: the pages of every layer, all of one shape, written in place (`kv_append`). Layers
            compute in order: where no token was stored before and none is read later, all may have
            the same pages.
        slot_mapping, block_table, seq_lens, query_starts: as in `kv_append` and `kv_attention`,
            the same for every layer.
        weights: `LAYER_WEIGHTS` for every layer, None for what it does not have: gain of the first
            norm; qkv; key_rotation; o_proj; gain of the second norm; gate_up; down_proj. Each
            linear is four: packed_weight, weight_scale, weight_sum, bias (`mixed_gemm`).
        eps: of the norms.
        scale: of the scores (`kv_attention`).
        n_hi: INT8 columns of the rows of hidden states, of attention and of the MLP.
        clip: factors on the range of the INT4 part of the same rows.
        lo_bits, symmetric: of all quantized rows, as in `mixed_quantize`.
        hi_bits: as in `kv_append`.
        hadamard, hadamard_block: as in `silu_mul_hadamard_quantize`.

    Returns:
        (out, residual), x's shape and dtype; the hidden state is their sum.

    Raises:
        RuntimeError: no layer, or a number, shape, dtype or device that is not as above: nothing is
            written. On CPUs also a slot, length or page out of range, as in `kv_append` and
            `kv_attention`; the first layer finds it.

    Source: arXiv 2412.14363, section 4.
    """
    out, residual = _library.call(
        torch.ops.resq.decoder_layers.default,
        x,
        cos,
        sin,
        caches,
        slot_mapping,
        block_table,
        seq_lens,
        query_starts,
        weights,
        eps,
        scale,
        n_hi,
        clip,
        lo_bits,
        symmetric,
        hi_bits,
        hadamard,
        hadamard_block,
    )
    return out, residual


@_library.register_fake("decoder_layers")
def _fake(
    x: torch.Tensor, *arguments: object, **named: object
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(x.dim() == 2, lambda: f"decoder_layers: x: expected 2 dimensions, got {x.dim()}")
    return torch.empty_like(x), torch.empty_like(x)
