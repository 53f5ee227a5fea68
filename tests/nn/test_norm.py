"""ResQRMSNorm: a gain of ones is left out, with the same bits, and only while it is ones.
FinalRMSNorm: an operator, and its gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixed_check import bits_equal

from resq_kernels import ops
from resq_kernels.formats import RowFormat
from resq_kernels.nn.convert import pack
from resq_kernels.nn.norm import FinalRMSNorm, ResQRMSNorm


def norm(dtype: torch.dtype = torch.float32) -> ResQRMSNorm:
    return ResQRMSNorm(128, 1e-5, RowFormat(16), dtype=dtype)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """The weights that the operator is called with."""
    seen: list[torch.Tensor | None] = []
    operator = ops.rms_norm_quantize

    def call(x: torch.Tensor, residual: Any, weight: Any, *rest: Any) -> Any:
        seen.append(weight)
        return operator(x, residual, weight, *rest)

    monkeypatch.setattr(ops, "rms_norm_quantize", call)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_its_gain_of_ones_the_bits_are_the_same(
    dtype: torch.dtype, weights: list[torch.Tensor | None]
) -> None:
    module = norm(dtype)
    x, residual = (torch.randn(2, 40, 128) * torch.randn(2, 40, 1).exp()).to(dtype)
    x[0], x[1, 5], residual[2, 7] = 0, float("inf"), float("nan")
    expected, expected_sum = module(x, residual)
    pack(module)
    quantized, new_residual = module(x, residual)
    assert weights == [module.weight, None]
    assert bits_equal(new_residual.nan_to_num(7.0), expected_sum.nan_to_num(7.0))
    assert torch.equal(quantized.q_lo, expected.q_lo)
    assert torch.equal(quantized.q_hi, expected.q_hi)
    assert bits_equal(quantized.params, expected.params)


def test_a_gain_is_used(weights: list[torch.Tensor | None]) -> None:
    module, x = norm(), torch.randn(3, 128)
    pack(module)
    ones = module(x)
    state = {"weight": torch.ones(128)}
    state["weight"][127] = 2.0
    for assign in (False, True):
        changed = copy.deepcopy(module)
        changed.load_state_dict(state, assign=assign)
        assert not torch.equal(changed(x).q_hi, ones.q_hi)
        changed.load_state_dict({"weight": torch.ones(128)})
        pack(changed)
        assert torch.equal(changed(x).q_hi, ones.q_hi)
    assert [weight is None for weight in weights] == [True, False, True, False, True]
    assert torch.equal(module.state_dict()["weight"], torch.ones(128))


@pytest.mark.filterwarnings("ignore:for weight")  # the first state is not loaded
def test_a_weight_without_values_is_not_ones() -> None:
    module = norm()
    pack(module)
    module.to("meta").load_state_dict({"weight": torch.ones(128)})
    assert not module.gain_is_one
    module.load_state_dict({"weight": torch.ones(128)}, assign=True)
    pack(module)
    assert module.gain_is_one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_final_norm_has_the_same_bits_with_a_gradient(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.rand(128).to(dtype) + 0.5)
    module, x = FinalRMSNorm(weight, 1e-5), torch.randn(2, 5, 128).to(dtype).requires_grad_()
    with torch.no_grad():
        plain = module(x)
    assert bits_equal(plain, ops.rms_norm(x.detach(), weight.detach(), 1e-5))
    normed = module(x)
    assert bits_equal(normed.detach(), plain)
    gradient = torch.randn(2, 5, 128).to(dtype)
    normed.backward(gradient)
    exact, gain = (t.detach().double().requires_grad_() for t in (x, weight))
    (exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain).backward(
        gradient.double()
    )
    # Rounded once, or, the gain's, to which every row adds, in the dtype of the sum.
    limit = 4 * torch.finfo(dtype).eps
    for got, want in ((x.grad, exact.grad), (weight.grad, gain.grad)):
        assert got is not None and want is not None and got.dtype == dtype
        assert (got.double() - want).norm() < limit * want.norm()
        assert (got.double() * (1 + 2 * limit) - want).norm() > limit * want.norm()


def test_the_final_norm_s_gain_trains_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(128))
    FinalRMSNorm(weight, 1e-5)(torch.randn(3, 128)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
