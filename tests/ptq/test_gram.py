"""Second moments with float32 products against float64, and what their error does to GPTQ."""

from __future__ import annotations

import pytest
import torch

from resq_kernels.ptq.calibrate import BATCH_TOKENS
from resq_kernels.ptq.gptq import gptq
from resq_kernels.ptq.gram import PANEL, Gram, gram_per_head
from resq_kernels.ptq.quantize import output_error


def rows(count: int, columns: int) -> torch.Tensor:
    """Correlated activations with a few channels 100 times as large as the others."""
    x = torch.randn(count, columns) @ torch.randn(columns, columns) / columns**0.5
    x[:, :: columns // 4] *= 100
    return x + 0.5


@pytest.mark.parametrize("columns", [8, PANEL, PANEL + 1, 2 * PANEL + 56])
def test_gram_is_the_mean_of_the_products(columns: int) -> None:
    x = rows(2 * BATCH_TOKENS + 100, columns)
    gram = Gram(columns, "cpu")
    for batch in x.split(BATCH_TOKENS):
        gram.add(batch.unflatten(0, (2, -1)))
    got, expected = gram.mean(), x.double().T @ x.double() / len(x)
    assert torch.equal(got, got.T)
    # Of each element against the sizes of its summands: the bound in Gram's docstring, and 4e-6.
    sizes = x.abs().double().T @ x.abs().double() / len(x)
    assert ((got - expected).abs() / sizes).max() < 4e-6
    assert ((got * (1 + 1e-5) - expected).abs() / sizes).max() > 4e-6


def test_gptq_does_not_see_the_difference() -> None:
    """Codes by the float32 sums against those by float64 ones: other ties, the same error."""
    x, weight = rows(2 * BATCH_TOKENS, 240), torch.randn(64, 240)
    gram = Gram(240, "cpu")
    for batch in x.split(BATCH_TOKENS):
        gram.add(batch)
    exact = x.double().T @ x.double() / len(x)
    got, expected = (gptq(weight, hessian, 30, 0.01)[0] for hessian in (gram.mean(), exact))
    assert (got.weight_lo == expected.weight_lo).float().mean() > 0.95
    errors = [output_error(weight, rounded.dequantize(), exact) for rounded in (got, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_gram_per_head() -> None:
    x = torch.randn(3, 6, 50, 16)
    heads = x.double().unflatten(1, (2, 3))
    expected = torch.einsum("wkgti,wkgtj->kij", heads, heads) / 3
    got = gram_per_head(x, 2)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert (got * 1.01 - expected).abs().max() > 1e-2


def test_gram_counts_a_row_as_often_as_its_weight() -> None:
    rows = torch.randn(2, 5, 33)
    weights = torch.tensor([[3.0, 1, 0, 1, 2], [1, 1, 1, 1, 4]])
    repeated = rows.flatten(0, 1).repeat_interleave(weights.flatten().long(), dim=0)
    gram = Gram(33, "cpu")
    gram.add(rows, weights)
    expected = repeated.double().T @ repeated.double() / 10
    assert torch.allclose(gram.mean(), expected, rtol=1e-5, atol=1e-6)
