"""hadamard against the exact transform: float64 and integers."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mixed_check import FLOAT_TYPES, UNIT, bits_equal

from resq_kernels import hadamard as matrices
from resq_kernels.ops import hadamard

# Every kind of row: powers of two around the vector width, Paley factors alone, with a short, an
# uneven and a long inner run, several factors, more than 64 columns per factor, GF(7^3).
SIZES = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 12, 20, 28, 36, 24, 48, 96, 144, 336, 560, 76, 152, 344]
SIZES += [1232, 688, 12 * 28 * 44 * 2, 28 * 512, 12**3 * 8]


def error_bound(x: torch.Tensor) -> torch.Tensor:
    """Bound on the float32 error of each row's outputs.

    An output is a sum of n signed inputs. log2(2^a) additions and, per Paley factor m, at most
    2 + m / 4 lie on the longest chain, each rounding to within UNIT of a partial sum that is at
    most sum |x|; one rounding more for the scale and one for its product.
    """
    *orders, power = matrices.factors(x.shape[-1])
    depth = math.log2(power) + sum(2 + order / 4 for order in orders) + 2
    return depth * UNIT * x.double().abs().sum(-1, keepdim=True) * x.shape[-1] ** -0.5


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_the_transform(n: int) -> None:
    x = torch.randn(3, n) * torch.randn(3, 1).exp()
    exact = matrices.transform(x.double())
    error = (hadamard(x).double() - exact).abs()
    bound = error_bound(x)
    assert (error <= bound).all(), f"{error.max():.3g} > {bound.max():.3g}"
    # One wrong sign moves an output by 2 |x| / sqrt(n): the bound tells it apart.
    wrong = 2 * x.double().abs().amax(-1, keepdim=True) * n**-0.5
    assert (wrong > bound).all()


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1300])
def test_hadamard_matrix_is_exact(n: int) -> None:
    """Small integers have exact sums, so every entry of the matrix shows."""
    exact = matrices.matrix(n)
    scale = n**0.5  # times 1 / sqrt(n): 1 up to a rounding
    assert torch.equal(torch.round(hadamard(torch.eye(n), scale)).long(), exact.T)
    x = torch.randint(-99, 100, (2, n))
    assert torch.equal(torch.round(hadamard(x.float(), scale)).long(), x @ exact.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hadamard_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 336).to(dtype)
    assert bits_equal(hadamard(x, 1.5), hadamard(x.float(), 1.5).to(dtype))


def test_hadamard_scales() -> None:
    x = torch.randn(2, 96)
    exact = matrices.transform(x.double())
    for scale in (-2.0, 0.5, 3.25):
        error = (hadamard(x, scale).double() - scale * exact).abs()
        assert (error <= abs(scale) * error_bound(x)).all()


def test_hadamard_twice_is_the_identity_for_powers_of_two() -> None:
    x = torch.randn(4, 2048)
    error = (hadamard(hadamard(x)) - x).abs().double()
    assert (error <= 2 * math.sqrt(2048) * error_bound(x)).all()


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,), (2, 3, 1, 24)])
def test_hadamard_batch_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = hadamard(x)
    assert y.shape == x.shape
    assert ((y.double() - matrices.transform(x.double())).abs() <= error_bound(x)).all()


def test_hadamard_takes_any_strides_and_leaves_its_input() -> None:
    x = torch.randn(24, 5, 96)
    before = x.clone()
    for view in (x.transpose(0, 1), x[..., ::4], x.permute(1, 2, 0), x[0, 0].expand(3, 96)):
        assert bits_equal(hadamard(view), hadamard(view.contiguous()))
    assert torch.equal(x, before)


def test_hadamard_of_not_finite_rows() -> None:
    x = torch.randn(3, 336)
    x[1, 100] = float("nan")
    y = hadamard(x)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


def test_hadamard_plans_are_built_once_by_any_thread() -> None:
    sizes = [12 * 20 * 2, 12 * 20 * 4, 20 * 20, 20 * 36, 36 * 36, 12 * 36]  # not used elsewhere
    inputs = [torch.randn(2, n) for n in sizes] * 4
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(hadamard, inputs))
    for x, y in zip(inputs, outputs, strict=True):
        assert bits_equal(y, hadamard(x))
        assert ((y.double() - matrices.transform(x.double())).abs() <= error_bound(x)).all()


@pytest.mark.parametrize(
    "x, sentence",
    [
        (torch.zeros(2, 8, dtype=torch.float64), "x: expected float32, float16 or bfloat16, got"),
        (torch.tensor(1.0), "x: expected at least one dimension, got float32 []"),
        (torch.zeros(2, 0), "x: expected rows of 2^a * m elements"),
        (torch.zeros(2, 3), "Paley orders m (12, 20, 28, ...), got 3"),
        (torch.zeros(2, 92 * 47), "Paley orders m (12, 20, 28, ...), got 4324"),
    ],
)
def test_hadamard_errors(x: torch.Tensor, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        hadamard(x)
    assert str(error.value).startswith("hadamard: ") and sentence in str(error.value)


def test_hadamard_opcheck() -> None:
    for dtype in FLOAT_TYPES:
        torch.library.opcheck(torch.ops.resq.hadamard.default, (torch.randn(3, 24).to(dtype), 2.0))


def test_hadamard_compiles() -> None:
    compiled = torch.compile(lambda x: hadamard(x + 1), fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 24)
        assert bits_equal(compiled(x), hadamard(x + 1))
