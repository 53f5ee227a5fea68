"""rms_norm_quantize on CUDA against the CPU, bit for bit, and against its float64 evaluation."""

from __future__ import annotations

import emulation
import pytest
import torch
from mixed_check import FLOAT_TYPES, assert_quantizes, assert_same_mixed, bits_equal
from rms_norm_exact import EPS, exact_rows

from resq_kernels.formats import MixedTensor

SIZES = [(256, 32), (64, 8), (37, 5), (10, 0), (7, 7), (1, 0), (0, 0), (130, 1), (896, 112)]
SIZES += [(1032, 8), (2048, 256), (3584, 448), (5120, 640), (8200, 8), (16400, 16), (2050, 250)]
SIZES += [(2568, 320), (7176, 8), (12296, 1536)]  # three, eight and sixteen chunks a thread


def assert_same_as_the_cpu(
    device: emulation.Emulated, *arguments, **options
) -> tuple[MixedTensor, torch.Tensor]:
    options.setdefault("packed", False)
    *actual, h = device.rms_norm_quantize(*arguments, **options)
    *expected, expected_h = torch.ops.resq.rms_norm_quantize(*arguments, **options)
    assert torch.equal(h.isnan(), expected_h.isnan())
    assert bits_equal(h.nan_to_num(7.0), expected_h.nan_to_num(7.0))
    assert_same_mixed(MixedTensor(*actual), MixedTensor(*expected))
    return MixedTensor(*actual), h


@pytest.mark.parametrize("k, n_hi", SIZES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rms_norm_quantize_values(
    sm90: emulation.Emulated, k: int, n_hi: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(3, k) * torch.randn(3, 1).exp()).to(dtype)
    residual = torch.randn(3, k).to(dtype)
    weight = torch.randn(k).to(dtype)
    packed = (k - n_hi) % 2 == 0
    for w in (None, weight):
        actual, h = assert_same_as_the_cpu(sm90, x, residual, w, EPS, n_hi, packed=packed)
        assert bits_equal(h, x + residual)
        if k:
            assert_quantizes(actual, *exact_rows(x, residual, w))
        assert_same_as_the_cpu(sm90, x, None, w, EPS, n_hi, lo_bits=8)


@pytest.mark.parametrize("weight_dtype", FLOAT_TYPES)
def test_rms_norm_quantize_weight_types(
    sm80: emulation.Emulated, weight_dtype: torch.dtype
) -> None:
    for dtype in FLOAT_TYPES:
        for k in (96, 50):
            weight = torch.randn(k).to(weight_dtype)
            assert_same_as_the_cpu(sm80, torch.randn(2, k).to(dtype), None, weight, EPS, 8)


def test_rms_norm_quantize_options(device: emulation.Emulated) -> None:
    x, residual = torch.randn(2, 4, 64)
    for options in ({"symmetric": True}, {"clip": 0.5}, {"symmetric": True, "clip": 0.5}):
        for weight in (None, torch.rand(64)):
            assert_same_as_the_cpu(device, x, residual, weight, EPS, 8, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_quantize_residual_rounds_like_torch(
    sm90: emulation.Emulated, dtype: torch.dtype
) -> None:
    """Sums of every magnitude, subnormal results, overflow to infinity and NaN included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(64, 1024)
    for residual in (x.flip(0), x * 0.37):
        _, h = assert_same_as_the_cpu(sm90, x, residual, None, EPS, 0)
        expected = x + residual
        numbers = ~expected.isnan()
        assert bits_equal(h[numbers], expected[numbers])


def test_rms_norm_quantize_extreme_magnitudes(sm90: emulation.Emulated) -> None:
    """Squares that underflow and overflow, rows of zeros, no eps: the inverse root is 0 or inf."""
    magnitudes = [0.0, 1e-44, 1e-30, 1e-20, 1e-15, 1.0, 1e15, 1e18, 1e19, 1e20, 1e30, 3e38]
    x = (torch.rand(12, 104) * 2 - 1) * torch.tensor(magnitudes)[:, None]
    for eps in (0.0, 1e-6):
        for weight in (None, torch.randn(104)):
            for rows in (x, x.abs(), -x.abs()):
                assert_same_as_the_cpu(sm90, rows, None, weight, eps, 24)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rms_norm_quantize_not_finite(sm90: emulation.Emulated, value: float) -> None:
    for k in (90, 96):
        x = torch.randn(3, k)
        x[1, 70] = value
        for weight in (None, torch.rand(k)):
            actual, _ = assert_same_as_the_cpu(sm90, x, None, weight, EPS, 16)
            assert actual.params[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,), (2, 3, 1, 64)])
def test_rms_norm_quantize_batch_shapes(sm80: emulation.Emulated, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    _, h = assert_same_as_the_cpu(sm80, x, residual, None, EPS, 8)
    assert h.shape == shape
    _, h = assert_same_as_the_cpu(sm80, x, None, None, EPS, 8)
    assert h.shape == (0,)


def test_rms_norm_quantize_takes_any_strides(sm90: emulation.Emulated) -> None:
    x = torch.randn(6, 5, 128)
    for view in (x.transpose(0, 1), x[..., ::2], x[0, 0].expand(4, 128)):
        weight = torch.randn(256)[::2][: view.shape[-1]]
        assert_same_as_the_cpu(sm90, view, view, weight, EPS, 8)
    unaligned = torch.randn(2 * 128 + 1)[1:].view(2, 128)
    assert_same_as_the_cpu(sm90, unaligned, torch.randn(2, 128), None, EPS, 8)
    assert_same_as_the_cpu(sm90, torch.randn(2, 128), unaligned, None, EPS, 8)
    assert_same_as_the_cpu(sm90, torch.randn(2, 128), None, unaligned[0], EPS, 8)


def test_rms_norm_quantize_check_rejects_another_order_of_the_sum(
    sm90: emulation.Emulated,
) -> None:
    """Permuted rows have the same sums of squares but for their roundings: some scale differs."""
    x = torch.randn(40, 2048)
    params = sm90.rms_norm_quantize(x, None, None, EPS, 0)[2]
    permuted = sm90.rms_norm_quantize(x[:, torch.randperm(2048)], None, None, EPS, 0)[2]
    torch.testing.assert_close(permuted, params, rtol=2e-6, atol=0)
    assert not bits_equal(permuted, params)


def test_rms_norm_quantize_errors(sm90: emulation.Emulated) -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="rms_norm_quantize: residual: expected x's dtype and"):
        sm90.rms_norm_quantize(x, x.half(), None, EPS, 0)
    with pytest.raises(RuntimeError, match=r"rms_norm_quantize: weight: expected \[8\]"):
        sm90.rms_norm_quantize(x, None, x[0, :4], EPS, 0)
