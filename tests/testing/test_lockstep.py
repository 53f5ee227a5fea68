"""Lockstep: along the kernels' codes the reference path agrees, and a wrong kernel is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from resq_kernels import ResQConfig
from resq_kernels.evaluate import perplexity
from resq_kernels.nn import prefill
from resq_kernels.testing.lockstep import Agreement, lockstep
from resq_kernels.testing.quantized_models import random_quantized


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Tiny models gain nothing from threads, and lose a factor of 10 on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(model: Any, tokens: torch.Tensor, other: Any = None) -> tuple[float, Agreement]:
    """log(perplexity of the kernels / of the reference path of `other`), and the counts."""

    def run(model: Any) -> float:
        return math.log(perplexity(model, tokens, seqlen=tokens.numel()).perplexity)

    with lockstep(other or model, lambda: run(model)) as (kernels, agreement):
        reference = run(other or model)
    return kernels - reference, agreement


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "quarot"},
        {"method": "quik"},
        {"method": "rtn", "symmetric": True},
        {"lo_bits": 8, "activation_clip": 0.9},
        {"kv_bits": 16},
    ],
    ids=str,
)
def test_paths_agree_along_the_same_codes(model_type: str, options: dict[str, Any]) -> None:
    biases = {} if model_type == "llama" else {"attention_bias": True, "mlp_bias": True}
    model = random_quantized(model_type, ResQConfig(**options), seed=1, **biases)
    difference, agreement = compare(model, tokens(96))
    assert agreement.refused <= 2  # attention outputs far smaller than the values they average
    assert abs(difference) < 1e-4
    # One row a token at four places of each of two layers and at the head; a key and a value per kv
    # head.
    heads = 1 if model_type == "qwen2" else 2
    kept = 2 * heads if model.model.layers[0].self_attn.kv_bits == 4 else 0
    assert agreement.rows == 96 * (2 * (4 + kept) + 1)
    assert 0 <= agreement.flipped < agreement.values / 500


def test_the_prefill_of_long_steps_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does with more than 64 new tokens: float16 attention over dequantized pages."""
    monkeypatch.setattr(prefill, "is_faster", lambda device_type, new, batch_invariant: True)
    difference, agreement = compare(random_quantized("llama"), tokens(96))
    assert agreement.refused <= 2
    assert abs(difference) < 1e-3
    assert agreement.rows == 96 * (2 * (4 + 4) + 1)


def test_bfloat16_model_agrees() -> None:
    model = random_quantized("llama", dtype=torch.bfloat16).to(torch.bfloat16)
    difference, agreement = compare(model, tokens(96))
    assert agreement.refused < agreement.rows / 20
    assert abs(difference) < 2e-2


@pytest.mark.parametrize("place", ["weight_scale", "key_rotation", "bias"])
def test_a_slightly_wrong_kernel_is_refused(place: str) -> None:
    model, other = random_quantized("qwen2"), random_quantized("qwen2")
    attention = other.model.layers[0].self_attn
    qkv = attention.qkv_proj
    first_v = qkv.out_features - qkv.rows["v_proj"]
    with torch.no_grad():
        if place == "weight_scale":
            qkv.weight_scale[first_v + 3] *= 1.05
        elif place == "bias":
            qkv.bias[first_v + 5] += 0.05
        else:
            attention.key_rotation[0, :, 0] *= 1.05
    _, agreement = compare(model, tokens(96), other)
    assert agreement.refused > 20


def test_another_pass_in_the_block_is_an_error() -> None:
    model = random_quantized("llama")
    ids = tokens(16)[None]
    with (
        pytest.raises(RuntimeError, match="26 tensors of the kernels were not reached"),
        lockstep(model, lambda: [model(ids), model(ids)]),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="quantizes more tensors than the kernels did"),
        lockstep(model, lambda: model(ids)),
    ):
        model(ids)
        model(ids)
