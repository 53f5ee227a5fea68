"""Gradients of the quantized modules against float64, and bits that they leave alone.

The reference of a module is its function without rounding, in float64, at the rounded numbers that
it computed with. EPS bounds a float32 rounding; a sum of n products is off by n EPS of its terms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from resq_kernels import hadamard, reference
from resq_kernels.config import ResQConfig
from resq_kernels.formats import RowFormat, join_heads
from resq_kernels.nn import straight
from resq_kernels.nn.batch import apply_rope
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.norm import ResQRMSNorm
from resq_kernels.testing.quantized_models import random_quantized

EPS = 2**-23
FORMAT = RowFormat(16)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def random_linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> ResQLinear:
    return ResQLinear.from_linear(torch.nn.Linear(columns, rows, dtype=dtype), high_columns=16)


@pytest.mark.parametrize("block", [64, straight.BLOCK_ROWS])
def test_a_linear(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight, "BLOCK_ROWS", block)
    linear = random_linear(200, 128)
    x, upstream = torch.randn(2, 7, 128, requires_grad=True), torch.randn(2, 7, 200)
    y = linear(x)
    assert torch.equal(y, linear(x.detach())) and not linear.bias.requires_grad
    y.backward(upstream)
    weight, by_y = linear.dequantize().double(), upstream.double()
    bound = 200 * EPS * (by_y.abs() @ weight.abs())
    assert ((x.grad - by_y @ weight).abs() <= bound).all()
    assert not ((x.grad - by_y[..., 1:] @ weight[1:]).abs() <= bound).all()  # without one row


def test_a_linear_in_bfloat16() -> None:
    linear = random_linear(64, 128, torch.bfloat16)
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(3, 64, dtype=torch.bfloat16)
    y = linear(x)
    y.backward(upstream)
    weight = linear.dequantize().double()
    bound = 2**-8 * 3 * (upstream.double().abs() @ weight.abs())  # weight, product, result
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert ((x.grad.double() - upstream.double() @ weight).abs() <= bound).all()


@pytest.mark.parametrize("gain_is_one", [True, False])
def test_a_norm(gain_is_one: bool) -> None:
    norm = ResQRMSNorm(128, 1e-5, FORMAT)
    if not gain_is_one:
        norm.weight.data.uniform_(0.5, 1.5)
    norm.pack()
    x, residual = (torch.randn(5, 128, requires_grad=True) for _ in range(2))
    rows, total = norm(x, residual)
    bits, exact_total = norm(x.detach(), residual.detach())
    assert all(map(torch.equal, rows.codes, bits)) and torch.equal(total, exact_total)
    assert torch.equal(rows.values, bits.dequantize())
    upstream, by_total = torch.randn(5, 128), torch.randn(5, 128)
    torch.autograd.backward([rows.values, total], [upstream, by_total])
    wide = (x + residual).detach().double().requires_grad_()
    F.rms_norm(wide, (128,), norm.weight.double(), 1e-5).backward(upstream.double())
    expected = wide.grad + by_total
    assert torch.equal(x.grad, residual.grad)
    assert relative(x.grad, expected) < 128 * EPS
    scale = (wide.detach().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    part = upstream * norm.weight * scale + by_total  # without the scale's own gradient
    assert relative(part, expected) > 1000 * 128 * EPS


@pytest.mark.parametrize("options", [{}, {"hadamard_block": 0}, {"method": "rtn"}], ids=str)
def test_an_mlp(options: dict[str, Any]) -> None:
    layer = random_quantized("llama", ResQConfig(**options)).model.layers[0]
    mlp, codes = layer.mlp, layer.post_attention_layernorm(torch.randn(6, 128))
    values = codes.dequantize().requires_grad_()
    y, upstream = mlp(straight.StraightRows(codes, values)), torch.randn(6, 128)
    assert torch.equal(y, mlp(codes))
    y.backward(upstream)
    weights = {name: part.dequantize().double() for name, part in mlp.fused.split().items()}
    x = values.detach().double().requires_grad_()
    hidden = F.silu(x @ weights["gate_proj"].T) * (x @ weights["up_proj"].T)
    if mlp.hadamard:
        k_hi = mlp.down_proj.row_format.k_hi
        hidden = hadamard.transform_low(hidden, k_hi, mlp.hadamard_block)
    (hidden @ mlp.down_proj.dequantize().double().T).backward(upstream.double())
    assert relative(values.grad, x.grad) < 192 * EPS
    mlp.down_proj.weight_scale.data[0] *= 1.01  # a row that weighs a little more
    values.grad = None
    mlp(straight.StraightRows(codes, values)).backward(upstream)
    assert relative(values.grad, x.grad) > 10 * 192 * EPS


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_attention(model_type: str, layer: int) -> None:
    model = random_quantized(model_type)
    attention, new = model.model.layers[layer].self_attn, 21
    hidden = torch.randn(2, new, 128)
    rope = model.model.rotary_emb(hidden, torch.arange(new)[None])
    codes = model.model.layers[layer].input_layernorm(hidden)
    values = codes.dequantize().requires_grad_()
    y, upstream = attention(straight.StraightRows(codes, values), rope)[0], torch.randn(2, new, 128)
    assert torch.equal(y, attention(codes, rope)[0])
    y.backward(upstream)

    def gradient(rounds: bool) -> torch.Tensor:
        x = values.detach().double().requires_grad_()
        parts = attention.fused.split().items()
        biases = [0 if part.bias is None else part.bias.double() for _, part in parts]
        q, k, v = (
            (x @ part.dequantize().double().T + bias).unflatten(-1, (-1, 64))
            for (_, part), bias in zip(parts, biases, strict=True)
        )
        norms = (attention.q_norm, attention.k_norm)
        if norms[0] is not None:
            pairs = zip((q, k), norms, strict=True)
            q, k = (F.rms_norm(h, (64,), norm.weight.double(), norm.eps) for h, norm in pairs)
        if attention.turned:
            q, k = (apply_rope(head, *(side.double() for side in rope)) for head in (q, k))
        q, k = (head @ attention.key_rotation[0].double() for head in (q, k))
        if rounds:
            stored = (reference.kv_fake_quantize(h.detach().float()).double() for h in (k, v))
            k, v = (s + h - h.detach() for s, h in zip(stored, (k, v), strict=True))
        heads = F.scaled_dot_product_attention(
            *(h.transpose(1, 2) for h in (q, k, v)), is_causal=True, enable_gqa=True
        )
        joined = join_heads(heads.transpose(1, 2), attention.head_dim_hi)
        (joined @ attention.o_proj.dequantize().double().T).backward(upstream.double())
        return x.grad

    tolerance = 256 * EPS
    assert relative(values.grad, gradient(rounds=True)) < tolerance
    assert relative(values.grad, gradient(rounds=False)) > 100 * tolerance


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part(side: str) -> None:
    """A padded sequence has the gradient that it has alone; padding has none."""
    model, pads, ids = random_quantized("llama"), 5, torch.randint(0, 256, (1, 20))
    alone = model.get_input_embeddings()(ids).detach().requires_grad_()
    pad = torch.randn(1, pads, 128)
    parts = [pad, alone.detach()] if side == "left" else [alone.detach(), pad]
    both = torch.cat([torch.cat(parts, dim=1), torch.randn(1, 20 + pads, 128)]).requires_grad_()
    tokens = slice(pads, None) if side == "left" else slice(0, 20)
    mask = torch.zeros(2, 20 + pads, dtype=torch.int64)
    mask[0, tokens], mask[1] = 1, 1
    upstream = torch.randn(1, 20, 320)
    model(inputs_embeds=alone).logits.backward(upstream)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    model(inputs_embeds=both, **given).logits[:1, tokens].backward(upstream)
    assert relative(both.grad[:1, tokens], alone.grad) < 256 * EPS
    found = both.grad.clone()
    found[0, tokens] = 0
    assert not found.any()


def test_a_cache_that_holds_tokens_is_refused() -> None:
    model = random_quantized("llama")
    ids = torch.randint(0, 256, (1, 6))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(ValueError, match="cache: expected an empty one or None where a gradient"):
        model(inputs_embeds=embeds, past_key_values=cache)


@pytest.mark.parametrize(
    "name", ["input_layernorm.weight", "o_proj.bias", "o_proj.weight_scale", "key_rotation"]
)
def test_a_base_in_training_is_refused(name: str) -> None:
    model = random_quantized("llama", attention_bias=True)
    trained = [p for n, p in model.named_parameters() if n.endswith(name)]
    assert trained
    ids = torch.randint(0, 256, (1, 6))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    for parameter in trained:
        parameter.requires_grad_()
    with pytest.raises(RuntimeError, match="expected a tensor that needs no gradient"):
        model(inputs_embeds=embeds)


def test_without_gradients_nothing_is_recorded() -> None:
    model = random_quantized("llama")
    ids = torch.randint(0, 256, (1, 6))
    assert not model(ids).logits.requires_grad
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits
        assert torch.equal(logits, model(inputs_embeds=embeds.detach()).logits)
        assert not logits.requires_grad
