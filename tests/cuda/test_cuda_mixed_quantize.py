"""mixed_quantize on CUDA against reference.mixed_quantize and the CPU, bit for bit."""

from __future__ import annotations

import emulation
import pytest
import torch
from mixed_check import FLOAT_TYPES, assert_same_mixed, bits_equal

from resq_kernels import ops, reference
from resq_kernels.formats import MixedTensor

# Odd widths; one to sixteen chunks a thread; rows longer than registers.
SIZES = [(256, 32), (64, 8), (37, 5), (10, 0), (9, 9), (1, 0), (1, 1), (0, 0), (1000, 125)]
SIZES += [(896, 112), (2048, 256), (3584, 448), (5120, 640), (8200, 8), (16400, 16), (2050, 250)]
SIZES += [(2568, 320), (7176, 8), (12296, 1536)]


def assert_exact(device: emulation.Emulated, x: torch.Tensor, n_hi: int, **options) -> MixedTensor:
    options.setdefault("packed", False)
    actual = MixedTensor(*device.mixed_quantize(x, n_hi, **options))
    assert_same_mixed(actual, reference.mixed_quantize(x, n_hi, **options))
    assert_same_mixed(actual, ops.mixed_quantize(x, n_hi, **options))
    return actual


def rows(count: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(count, k) * torch.randn(count, 1).exp() + torch.randn(count, 1)).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("k, n_hi", SIZES)
def test_mixed_quantize_is_exact(
    sm90: emulation.Emulated, dtype: torch.dtype, k: int, n_hi: int
) -> None:
    x = rows(3, k, dtype)
    assert_exact(sm90, x, n_hi)
    assert_exact(sm90, x, n_hi, symmetric=True, clip=0.9, lo_bits=8)
    if (k - n_hi) % 2 == 0:
        assert_exact(sm90, x, n_hi, packed=True, clip=0.9)


@pytest.mark.parametrize("k_lo", range(2, 40, 2))
def test_mixed_quantize_packs_any_even_width(sm80: emulation.Emulated, k_lo: int) -> None:
    assert_exact(sm80, torch.randn(2, k_lo + 3), 3, packed=True)
    assert_exact(sm80, torch.randn(2, k_lo + 8).bfloat16(), 8, packed=True)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_quantize_extreme_magnitudes(
    sm90: emulation.Emulated, dtype: torch.dtype, symmetric: bool
) -> None:
    finite = torch.finfo(dtype)
    magnitudes = [finite.smallest_normal / 8, finite.tiny, 1e-20, 1e-6, 1.0, finite.max / 4]
    magnitudes = torch.tensor(magnitudes, dtype=torch.float64)
    x = (torch.rand(6, 96, dtype=torch.float64) * 2 - 1) * magnitudes[:, None]
    for rows in (x, x.abs(), -x.abs(), x * 0, -(x * 0)):
        for clip in (1.0, 1e-3, 1e-30):  # with a small clip nearly every code is clamped
            assert_exact(sm90, rows.to(dtype), 16, symmetric=symmetric, clip=clip)
    full = torch.full((1, 40), finite.max, dtype=dtype)
    full[:, ::2] *= -1  # in float32 the span of the row overflows
    assert_exact(sm90, full, 8, symmetric=symmetric)


def test_mixed_quantize_rounds_half_to_even(sm90: emulation.Emulated) -> None:
    halves = torch.arange(-7.5, 8.0, 1.0)  # scale 1, every product a tie
    for shift in (0.0, 1.0, 2.0):  # the zero point is even and odd
        assert_exact(sm90, (halves + shift).unsqueeze(0), 0)
        assert_exact(sm90, (halves + shift).unsqueeze(0), 0, packed=True)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("k, n_hi", [(90, 20), (96, 16)])
def test_mixed_quantize_marks_rows_that_are_not_finite(
    sm90: emulation.Emulated, dtype: torch.dtype, k: int, n_hi: int
) -> None:
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        x = torch.randn(k + 1, k).to(dtype)
        for i in range(k):  # every position once, the last row stays finite
            x[i, i] = value
        actual = assert_exact(sm90, x, n_hi, packed=True)
        assert actual.params[:, 0].isnan().tolist() == [i < k - n_hi for i in range(k + 1)]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,), (2, 3, 1, 64)])
def test_mixed_quantize_batch_shapes(device: emulation.Emulated, shape: tuple[int, ...]) -> None:
    assert_exact(device, torch.randn(shape), 8, packed=True)


def test_mixed_quantize_takes_any_strides(sm90: emulation.Emulated) -> None:
    x = torch.randn(6, 5, 128)
    for view in (x.transpose(0, 1), x[..., ::2], x[:, 1:4, 3:99], x[0, 0].expand(4, 128)):
        assert_exact(sm90, view, 8)
    unaligned = torch.randn(2 * 128 + 1)[1:].view(2, 128)  # contiguous, 4 bytes past
    assert_exact(sm90, unaligned, 8, packed=True)


def test_mixed_quantize_packs_where_the_matrix_product_does(
    sm80: emulation.Emulated, sm90: emulation.Emulated
) -> None:
    x = torch.randn(2, 33)
    assert sm80.mixed_quantize(x, 1)[0].dtype == torch.uint8
    assert sm80.mixed_quantize(x, 2)[0].dtype == torch.int8  # an odd number of codes
    assert sm80.mixed_quantize(x, 1, 8)[0].dtype == torch.int8
    assert sm90.mixed_quantize(x, 1)[0].dtype == torch.int8


def test_mixed_quantize_check_rejects_a_wrong_rounding(sm90: emulation.Emulated) -> None:
    """Division instead of the product with 1 / scale changes codes: the comparison sees it."""
    x = torch.randn(64, 256)
    actual = MixedTensor(*sm90.mixed_quantize(x, 0, packed=False))
    scale, zero = actual.params[:, :1], actual.params[:, 1:2]
    divided = (torch.round(x / scale) + zero).clamp(-8, 7).to(torch.int8)
    away = (torch.floor(x * (1 / scale) + 0.5) + zero).clamp(-8, 7).to(torch.int8)
    halves = torch.tensor([[-7.5, 0.5, 7.5]])
    assert not bits_equal(actual.params, actual.params * (1 + 2**-23))
    assert (divided != actual.q_lo).sum() <= 2 and (away != actual.q_lo).sum() <= 2
    assert sm90.mixed_quantize(halves, 0, packed=False)[0][0, 1] != 1  # away from 0 it would be


def test_mixed_quantize_errors(sm90: emulation.Emulated) -> None:
    with pytest.raises(RuntimeError, match="mixed_quantize: n_hi: expected 0 to 8"):
        sm90.mixed_quantize(torch.zeros(2, 8), 9)
    with pytest.raises(RuntimeError, match="mixed_quantize: x: expected float32, float16 or bf"):
        sm90.mixed_quantize(torch.zeros(2, 8).int(), 0)
