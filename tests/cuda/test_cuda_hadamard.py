"""hadamard on CUDA: the CPU's bits where its additions are the CPU's, else within a bound."""

from __future__ import annotations

import math

import emulation
import pytest
import torch
from mixed_check import FLOAT_TYPES, UNIT

from resq_kernels import hadamard as matrices
from resq_kernels.ops import hadamard

IN_THREAD = {12, 20, 28, 44}  # orders that add in the CPU's order; the others: tensor cores
MLP_WIDTHS = [4864, 8192, 8960, 11008, 13824, 14336, 18944, 27648, 28672, 29568]
SHARDS = sorted({n // parts for n in MLP_WIDTHS for parts in (1, 2, 4, 8)})
POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 32768]
# Orders alone, with short inner runs, several on the tensor cores, construction II, GF(7^3).
OTHERS = [12, 20, 28, 36, 44, 60, 68, 24, 48, 96, 144, 72, 76, 152, 336, 344, 560, 1232]
OTHERS += [36 * 36, 36 * 60, 20 * 36 * 4, 12 * 76, 500, 1020]
SIZES = sorted({*SHARDS, *POWERS, *OTHERS})


def adds_like_the_cpu(n: int) -> bool:
    return IN_THREAD.issuperset(matrices.factors(n)[:-1])


def error_bound(x: torch.Tensor) -> torch.Tensor:
    """Bound on the float32 error of each row's outputs.

    As in tests/ops/test_hadamard.py; on the tensor cores a factor m has 3 m / 16 sums of 16
    products and the sum before. A tensor core may cut off instead of rounding, after aligning the
    17 numbers to the largest one: 17 times 2 UNIT of a partial sum that is at most sum |x|.
    """
    *orders, power = matrices.factors(x.shape[-1])
    depth = math.log2(power) + 2
    for order in orders:
        depth += 2 + order / 4 if order in IN_THREAD else 3 * (order / 16 + 1) * 34
    return depth * UNIT * x.double().abs().sum(-1, keepdim=True) * x.shape[-1] ** -0.5


def assert_transforms(actual: torch.Tensor, x: torch.Tensor) -> None:
    if adds_like_the_cpu(x.shape[-1]):
        assert torch.equal(actual, hadamard(x))
    error = (actual.double() - matrices.transform(x.double())).abs()
    bound = error_bound(x)
    assert (error <= bound).all(), f"{error.max():.3g} > {bound.max():.3g}"


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_the_transform(sm90: emulation.Emulated, n: int) -> None:
    x = torch.randn(2 if n < 5000 else 1, n) * 3
    assert_transforms(sm90.hadamard(x), x)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1300])
def test_hadamard_matrix_is_exact(sm80: emulation.Emulated, n: int) -> None:
    """Small integers have exact sums: every sign of the matrix counts."""
    exact = matrices.matrix(n)
    x = torch.randint(-99, 100, (2, n))
    y = sm80.hadamard(x.float(), n**0.5)  # times 1 / sqrt(n): 1 up to a rounding
    assert torch.equal(torch.round(y).long(), x @ exact.T)


def test_hadamard_check_rejects_one_wrong_sign(sm90: emulation.Emulated) -> None:
    for n in (344, 1232, 4864):
        x = torch.randn(1, n)
        x[0, n // 2] = 1.0  # the sign of a number near 0 cannot be told
        y = sm90.hadamard(x)
        assert_transforms(y, x)
        y[0, n // 3] -= 2 * x[0, n // 2] * n**-0.5
        with pytest.raises(AssertionError):
            assert_transforms(y, x)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_hadamard_types_and_scales(device: emulation.Emulated, dtype: torch.dtype) -> None:
    for n in (336, 36, 12, 64, 2):
        x = torch.randn(3, n).to(dtype)
        exact = 1.5 * matrices.transform(x.double())
        y = device.hadamard(x, 1.5)
        assert y.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        assert ((y.double() - exact).abs() <= 1.5 * error_bound(x) * 1.01 + rounding).all()
        assert torch.equal(y, device.hadamard(x.float(), 1.5).to(dtype))


def test_hadamard_of_large_and_not_finite_rows(sm90: emulation.Emulated) -> None:
    for n in (336, 344, 608):
        x = torch.randn(4, n) * 1e4
        x[0, 5] = 1e38  # twice that is finite: nothing overflows on the way
        x[1, 7], x[2, 9] = float("nan"), float("inf")
        y = sm90.hadamard(x)
        assert_transforms(y[[0, 3]], x[[0, 3]])
        assert not y[1].isfinite().any() and not y[2].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,), (2, 3, 1, 24)])
def test_hadamard_batch_shapes(sm80: emulation.Emulated, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = sm80.hadamard(x)
    assert y.shape == x.shape
    assert_transforms(y, x)


def test_hadamard_takes_any_strides(sm90: emulation.Emulated) -> None:
    x = torch.randn(24, 5, 96)
    for view in (x.transpose(0, 1), x[..., ::4], x[0, 0].expand(3, 96), x.flatten()[1:97]):
        assert_transforms(sm90.hadamard(view), view)


def test_hadamard_does_not_depend_on_the_batch(sm90: emulation.Emulated) -> None:
    for n in (72, 336):  # 72: several rows a block, which keeps its tables
        x = torch.randn(90, n)
        whole = sm90.hadamard(x)
        for i in (0, 89):
            assert torch.equal(sm90.hadamard(x[i]), whole[i])


def test_hadamard_errors(sm90: emulation.Emulated) -> None:
    with pytest.raises(RuntimeError, match=r"hadamard: x: expected rows of 2\^a \* m elements"):
        sm90.hadamard(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="hadamard: x: expected rows that fit the shared mem"):
        sm90.hadamard(torch.zeros(1, 65536))
