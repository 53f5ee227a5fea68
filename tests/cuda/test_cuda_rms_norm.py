"""rms_norm on CUDA against the CPU, bit for bit."""

from __future__ import annotations

import emulation
import pytest
import torch
from mixed_check import FLOAT_TYPES, bits_equal
from rms_norm_exact import EPS, assert_normalizes

SIZES = [1, 7, 10, 37, 64, 130, 896, 1032, 2048, 2050, 2568, 3584, 5120, 7176, 8200, 12296, 16400]


def assert_same_as_the_cpu(device: emulation.Emulated, *arguments: object) -> torch.Tensor:
    actual, expected = device.rms_norm(*arguments), torch.ops.resq.rms_norm(*arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert bits_equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    return actual


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_values(sm90: emulation.Emulated, k: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, k) * torch.randn(3, 1).exp()).to(dtype)
    for weight in (None, torch.randn(k).to(dtype)):
        assert_normalizes(assert_same_as_the_cpu(sm90, x, weight, EPS), x, weight)


@pytest.mark.parametrize("weight_dtype", FLOAT_TYPES)
def test_weight_types(device: emulation.Emulated, weight_dtype: torch.dtype) -> None:
    for dtype in FLOAT_TYPES:
        for k in (96, 50):
            weight = torch.randn(k).to(weight_dtype)
            assert_same_as_the_cpu(device, torch.randn(2, k).to(dtype), weight, EPS)


def test_extreme_magnitudes(sm90: emulation.Emulated) -> None:
    """Squares that underflow and overflow, rows of zeros, no eps: the inverse root is 0 or inf."""
    magnitudes = [0.0, 1e-44, 1e-30, 1e-20, 1e-15, 1.0, 1e15, 1e18, 1e19, 1e20, 1e30, 3e38]
    x = (torch.rand(12, 104) * 2 - 1) * torch.tensor(magnitudes)[:, None]
    for eps in (0.0, 1e-6):
        for weight in (None, torch.randn(104)):
            assert_same_as_the_cpu(sm90, x, weight, eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(sm90: emulation.Emulated, value: float) -> None:
    for k in (90, 96):
        x = torch.randn(3, k)
        x[1, 70] = value
        actual = assert_same_as_the_cpu(sm90, x, torch.rand(k), EPS)
        assert actual[1, 70].isnan() and actual[[0, 2]].isfinite().all()


def test_batches_strides_and_alignment(sm80: emulation.Emulated) -> None:
    for shape in ((0, 64), (3, 0, 64), (64,), (2, 3, 1, 64)):
        assert assert_same_as_the_cpu(sm80, torch.randn(shape), None, EPS).shape == shape
    x = torch.randn(6, 5, 128)
    for view in (x.transpose(0, 1), x[..., ::2], x[0, 0].expand(4, 128)):
        assert_same_as_the_cpu(sm80, view, torch.randn(256)[::2][: view.shape[-1]], EPS)
    unaligned = torch.randn(2 * 128 + 1).half()[1:].view(2, 128)
    assert_same_as_the_cpu(sm80, unaligned, torch.randn(128).half(), EPS)
    assert_same_as_the_cpu(sm80, torch.randn(2, 128).half(), unaligned[0], EPS)


def test_the_comparison_rejects_another_order_of_the_sum(sm90: emulation.Emulated) -> None:
    """Permuted rows have the same sums of squares but for their roundings: some row differs."""
    x, order = torch.randn(40, 2048), torch.randperm(2048)
    normed, permuted = sm90.rms_norm(x, None, EPS), sm90.rms_norm(x[:, order], None, EPS)
    assert not bits_equal(permuted, normed[:, order])


def test_errors(sm90: emulation.Emulated) -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match=r"rms_norm: weight: expected \[8\]"):
        sm90.rms_norm(x, x[0, :4], EPS)
