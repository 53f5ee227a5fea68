"""kv_append applies the RoPE of transformers, Llama 3's scaled frequencies included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from resq_kernels import kv_pages, ops
from resq_kernels.reference.kv_pages import read_tokens
from resq_kernels.testing.tiny_models import LLAMA3_ROPE

PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
POSITIONS = torch.tensor([0, 1, 2, 63, 8191, 8192, 70000, 131071])


def angles(parameters: dict[str, Any], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D] as a model with these parameters passes them to its attention."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    rows = torch.zeros(1, len(POSITIONS), 1)
    cos, sin = LlamaRotaryEmbedding(config)(rows, POSITIONS[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("parameters", [PLAIN, LLAMA3_ROPE], ids=["default", "llama3"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_is_that_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    cos, sin = angles(parameters, head_dim)
    other = angles(LLAMA3_ROPE if parameters is PLAIN else PLAIN, head_dim)
    assert not torch.equal(cos, other[0]), "the scaling has no effect on these positions"
    q, k = torch.randn(len(POSITIONS), 4, head_dim), torch.randn(len(POSITIONS), 2, head_dim)
    cache = torch.zeros(kv_pages.cache_shape(1, 2, 32, head_dim), dtype=torch.uint8)
    slots = torch.arange(len(POSITIONS))
    got_q = ops.kv_append(k, k, cos, sin, None, cache, slots, 8, q)
    got_k = read_tokens(cache, slots, head_dim)[0].dequantize()
    q, k = q.double().transpose(0, 1)[None], k.double().transpose(0, 1)[None]
    exact_q, exact_k = (
        x[0].transpose(0, 1)
        for x in apply_rotary_pos_emb(q, k, cos.double()[None], sin.double()[None])
    )
    # Two products and a sum, each rounded to float32; |cos| and |sin| are at most 1.
    pairs = torch.hypot(*exact_q.chunk(2, dim=-1)).repeat(1, 1, 2)
    bound = 3 * 2.0**-24 * 2**0.5 * pairs
    assert ((got_q - exact_q).abs() <= bound).all()
    # Half a step of 4 bits over a row's range of at most 2 max |k|.
    assert ((got_k - exact_k).abs() <= exact_k.abs().amax(-1, keepdim=True) / 15 * 1.01).all()
    wrong_q = apply_rotary_pos_emb(q, k, *(x.double()[None] for x in other))[0][0].transpose(0, 1)
    assert not ((got_q - wrong_q).abs() <= bound).all()
