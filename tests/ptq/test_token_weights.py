"""Weights of tokens, and the bases and rounded weights that they lead to."""

from __future__ import annotations

import math

import pytest
import torch

from resq_kernels.ptq import token_weights
from resq_kernels.ptq.basis import joint_components, principal_components
from resq_kernels.ptq.gptq import gptq
from resq_kernels.ptq.gram import Gram
from resq_kernels.ptq.token_weights import attention_weights


def exact_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64, [windows, heads, seqlen, seqlen]."""
    keys = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.double() @ keys.mT / queries.shape[-1] ** 0.5
    seqlen = scores.shape[-1]
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    return torch.where(visible, scores, -torch.inf).softmax(-1)


@pytest.mark.parametrize("seqlen", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("stride", [1, 8])
def test_attention_weights(seqlen: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_weights, "QUERY_STRIDE", stride)
    queries, keys = torch.randn(3, 6, seqlen, 16), torch.randn(3, 2, seqlen, 16)
    attention = exact_attention(queries, keys)
    looked = attention[:, :, range(seqlen - 1, -1, -stride)]
    expected = 1 + looked.square().sum(2).mean(1) * seqlen / looked.shape[2]
    expected = expected / expected.mean(1, keepdim=True)
    got = attention_weights(queries, keys)
    assert got.shape == (3, seqlen) and got.dtype == torch.float32
    # A score is within 16 products and a sum of 2^-24 of its size; the weights feel twice that.
    assert (got - expected).abs().max() < 2e-5 * expected.max()


def test_a_sink_has_the_weight_of_many_tokens() -> None:
    queries, keys = torch.randn(1, 4, 512, 16), torch.randn(1, 4, 512, 16)
    queries[..., 0], keys[..., 0] = 6, 0
    keys[:, :, 3] = 0
    keys[:, :, 3, 0] = 6  # a score of 9 above all others: 0.9 of the attention
    weights = attention_weights(queries, keys)
    assert weights[0, 3] > 50 * weights[0].median()
    assert weights.mean() == pytest.approx(1, abs=1e-5)


def test_gram_counts_a_row_as_often_as_its_weight() -> None:
    rows = torch.randn(2, 5, 33)
    weights = torch.tensor([[3.0, 1, 0, 1, 2], [1, 1, 1, 1, 4]])
    repeated = rows.flatten(0, 1).repeat_interleave(weights.flatten().long(), dim=0)
    gram = Gram(33, "cpu")
    gram.add(rows, weights)
    expected = repeated.double().T @ repeated.double() / 10
    assert torch.allclose(gram.mean(), expected, rtol=1e-5, atol=1e-6)


def test_a_sink_has_an_exact_value() -> None:
    inputs = torch.randn(1, 1024, 96)
    queries, keys = torch.randn(1, 4, 1024, 16), torch.randn(1, 4, 1024, 16)
    queries[..., 0], keys[..., 0], keys[:, :, 0] = 6, 0, 0
    keys[:, :, 0, 0] = 6
    weight = torch.randn(64, 96)
    errors = []
    for weights in (None, attention_weights(queries, keys)):
        gram = Gram(96, "cpu")
        gram.add(inputs, weights)
        rounded = gptq(weight, gram.mean(), 0, 0.01)[0].dequantize()
        errors.append((inputs[0] @ (weight - rounded).T).square().mean(-1))
    plain, weighted = errors
    assert weighted[0] < 0.2 * plain[0]
    assert weighted[1:].mean() < 1.1 * plain[1:].mean()


def product(basis: torch.Tensor, keys: torch.Tensor, queries: torch.Tensor, low: int) -> float:
    part = basis[:, :low]
    return float((keys @ part * part).sum() * (queries @ part * part).sum())


def test_no_step_of_joint_components_raises_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(10):
        keys, queries = (a @ a.T for a in torch.randn(2, 12, 12, dtype=torch.float64))
        products = []
        for steps in (1, 2, 3, 5, 10, 200):
            monkeypatch.setattr("resq_kernels.ptq.basis.JOINT_STEPS", steps)
            found = joint_components(keys, queries, 9)
            assert torch.allclose(found @ found.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
            products.append(product(found, keys, queries, 9))
        assert all(b <= a * (1 + 1e-12) for a, b in zip(products, products[1:], strict=False))
        # At the limit no turn of a low and a high column by a hundredth lowers it.
        for low in range(9):
            for high in range(9, 12):
                for angle in (-0.01, 0.01):
                    turned, c, s = found.clone(), math.cos(angle), math.sin(angle)
                    turned[:, low] = c * found[:, low] - s * found[:, high]
                    assert product(turned, keys, queries, 9) > products[-1] * (1 - 1e-9)


def test_joint_components_leave_less_noise_in_the_scores_than_either_alone() -> None:
    spread = torch.logspace(-1, 0, 64, dtype=torch.float64) ** 4
    spread[-4:] = 3  # four loud directions each: together they fill the INT8 part
    turned = torch.linalg.qr(torch.randn(2, 3, 64, 64, dtype=torch.float64))[0] * spread
    keys, queries = turned @ turned.mT
    joint = joint_components(keys, queries, 56)
    for index in range(3):
        pair = keys[index], queries[index]
        best = product(joint[index], *pair, 56)
        for other in (*(principal_components(m)[1] for m in pair), torch.eye(64).double()):
            assert best < 0.3 * product(other, *pair, 56)
    # Where both agree, it is their principal basis.
    same = joint_components(keys, 2 * keys, 56)
    exact = principal_components(keys)[1]
    energy = (exact[..., 56:].mT @ same[..., 56:]).square().sum((-2, -1))
    assert torch.allclose(energy, torch.full((3,), 8.0).double(), atol=1e-6)


def test_joint_components_of_nothing_are_a_basis() -> None:
    zero = torch.zeros(2, 8, 8, dtype=torch.float64)
    zero[1, 0, 0] = 1  # fewer tokens than dims
    basis = joint_components(zero, zero, 7)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(basis @ basis.mT, eye.expand(2, 8, 8), atol=1e-12)
    assert basis[1, 0, 7].abs() == pytest.approx(1)
