"""Weights of tokens, and the rounded weights that they lead to."""

from __future__ import annotations

import pytest
import torch

from resq_kernels.ptq import token_weights
from resq_kernels.ptq.gptq import gptq
from resq_kernels.ptq.gram import Gram
from resq_kernels.ptq.token_weights import attention_weights, looked_at


def exact_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64, [windows, heads, seqlen, seqlen]."""
    keys = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.double() @ keys.mT / queries.shape[-1] ** 0.5
    seqlen = scores.shape[-1]
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    return torch.where(visible, scores, -torch.inf).softmax(-1)


def weights_of(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`attention_weights` from the queries of all tokens."""
    return attention_weights(queries[:, :, looked_at(keys.shape[2], keys.device)], keys)


@pytest.mark.parametrize("seqlen", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("stride", [1, 8])
def test_attention_weights(seqlen: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_weights, "QUERY_STRIDE", stride)
    queries, keys = torch.randn(3, 6, seqlen, 16), torch.randn(3, 2, seqlen, 16)
    attention = exact_attention(queries, keys)
    looked = attention[:, :, range(seqlen - 1, -1, -stride)]
    expected = 1 + looked.square().sum(2).mean(1) * seqlen / looked.shape[2]
    expected = expected / expected.mean(1, keepdim=True)
    got = weights_of(queries, keys)
    assert got.shape == (3, seqlen) and got.dtype == torch.float32
    # A score is within 16 products and a sum of 2^-24 of its size; the weights feel twice that.
    assert (got - expected).abs().max() < 2e-5 * expected.max()


def test_a_sink_has_the_weight_of_many_tokens() -> None:
    queries, keys = torch.randn(1, 4, 512, 16), torch.randn(1, 4, 512, 16)
    queries[..., 0], keys[..., 0] = 6, 0
    keys[:, :, 3] = 0
    keys[:, :, 3, 0] = 6  # a score of 9 above all others: 0.9 of the attention
    weights = weights_of(queries, keys)
    assert weights[0, 3] > 50 * weights[0].median()
    assert weights.mean() == pytest.approx(1, abs=1e-5)


def test_a_sink_has_an_exact_value() -> None:
    inputs = torch.randn(1, 1024, 96)
    queries, keys = torch.randn(1, 4, 1024, 16), torch.randn(1, 4, 1024, 16)
    queries[..., 0], keys[..., 0], keys[:, :, 0] = 6, 0, 0
    keys[:, :, 0, 0] = 6
    weight = torch.randn(64, 96)
    errors = []
    for weights in (None, weights_of(queries, keys)):
        gram = Gram(96, "cpu")
        gram.add(inputs, weights)
        rounded = gptq(weight, gram.mean(), 0, 0.01)[0].dequantize()
        errors.append((inputs[0] @ (weight - rounded).T).square().mean(-1))
    plain, weighted = errors
    assert weighted[0] < 0.2 * plain[0]
    assert weighted[1:].mean() < 1.1 * plain[1:].mean()
