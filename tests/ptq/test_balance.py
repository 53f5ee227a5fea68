"""Changes of basis and factors: inverses, and that nothing else does better."""

from __future__ import annotations

import pytest
import torch

from resq_kernels.ptq.balance import FLOOR, balancing, channel_factors


def spread(*size: int) -> torch.Tensor:
    """Positive numbers over three decades, float64."""
    return torch.exp(1.7 * torch.randn(*size, dtype=torch.float64).clamp(-2, 2))


def moment(size: int, *batch: int) -> torch.Tensor:
    x = torch.randn(*batch, 3 * size, size, dtype=torch.float64)
    x = x * spread(*batch, 1, size).sqrt() @ torch.randn(size, size, dtype=torch.float64)
    return x.mT @ x


@pytest.mark.parametrize(("size", "batch"), [(1, ()), (8, ()), (16, (2, 3))])
def test_balancing_makes_both_moments_the_same_diagonal(size: int, batch: tuple) -> None:
    a, b = moment(size, *batch), moment(size, *batch)
    matrix, inverse, sigma = balancing(a, b)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ inverse, eye.expand_as(a), atol=1e-9, rtol=0)
    assert (sigma.diff(dim=-1) >= 0).all() and (sigma > 0).all()

    def floored(m: torch.Tensor) -> torch.Tensor:
        return m + FLOOR * m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye

    diagonal = torch.diag_embed(sigma)
    bound = 1e-9 * float(sigma.max())
    assert (matrix.mT @ floored(a) @ matrix - diagonal).abs().max() < bound
    assert (inverse @ floored(b) @ inverse.mT - diagonal).abs().max() < bound


def test_no_change_of_basis_has_a_smaller_product_of_traces() -> None:
    a, b = moment(6), moment(6)
    matrix, inverse, sigma = balancing(a, b)

    def product(m: torch.Tensor) -> float:
        inv = torch.linalg.inv(m)
        return float((m.mT @ a @ m).trace() * (inv @ b @ inv.mT).trace())

    best = product(matrix)
    # The floor of 1e-3 moves the optimum by less than 1 %.
    assert best < 1.01 * float(sigma.sum()) ** 2
    assert product(torch.eye(6, dtype=torch.float64)) > best
    for _ in range(50):
        step = 0.1 * torch.randn(6, 6, dtype=torch.float64)
        assert product(matrix @ torch.linalg.matrix_exp(step)) > 0.99 * best


def test_moments_without_rank_stay_invertible() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    matrix, inverse, sigma = balancing(x.T @ x, torch.zeros(8, 8, dtype=torch.float64))
    assert torch.isfinite(matrix).all() and torch.isfinite(inverse).all()
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(matrix @ inverse, eye, atol=1e-9, rtol=0)


def test_channel_factors_minimise_the_noise() -> None:
    activation, weight = spread(5, 64), spread(5, 64)
    factors = channel_factors(activation, weight)
    torch.testing.assert_close(factors.log().sum(-1), torch.zeros(5, dtype=torch.float64))

    def noise(s: torch.Tensor) -> torch.Tensor:
        return (s.square() * activation).sum(-1) * (weight / s.square()).sum(-1)

    best = noise(factors)
    # The floor costs at most a few percent; wrong exponents (plain ratio, none) cost more.
    ideal = (activation * weight).sqrt().sum(-1).square()
    assert (best < 1.1 * ideal).all()
    assert (noise(factors.square()) > 1.1 * best).all()
    assert (noise(torch.ones_like(factors)) > 1.1 * best).all()


def test_dead_channels_get_finite_factors() -> None:
    activation = torch.tensor([[0.0, 1.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    factors = channel_factors(activation, torch.ones(2, 3, dtype=torch.float64))
    assert torch.isfinite(factors).all() and (factors > 0).all()
    assert torch.equal(factors[1], torch.ones(3, dtype=torch.float64))
