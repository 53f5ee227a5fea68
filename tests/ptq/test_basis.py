"""The basis that splits keys and queries."""

from __future__ import annotations

import math

import pytest
import torch

from resq_kernels.ptq import basis as stage
from resq_kernels.ptq.basis import joint_components, principal_components


def product(basis: torch.Tensor, keys: torch.Tensor, queries: torch.Tensor, low: int) -> float:
    part = basis[:, :low]
    return float((keys @ part * part).sum() * (queries @ part * part).sum())


def test_no_step_of_joint_components_raises_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(10):
        keys, queries = (a @ a.T for a in torch.randn(2, 12, 12, dtype=torch.float64))
        products = []
        for steps in (1, 2, 3, 5, 10, 200):
            monkeypatch.setattr(stage, "JOINT_STEPS", steps)
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
