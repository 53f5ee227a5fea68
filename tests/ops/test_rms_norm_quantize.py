"""rms_norm_quantize against its float64 evaluation."""

from __future__ import annotations

import pytest
import torch
from mixed_check import FLOAT_TYPES, UNIT, assert_quantizes, assert_same_mixed, bits_equal
from rms_norm_exact import EPS, exact_rows

from resq_kernels import reference
from resq_kernels.formats import MixedTensor, pack_int4
from resq_kernels.ops import rms_norm_quantize

SIZES = [(256, 32), (64, 8), (37, 5), (10, 0), (7, 7), (1, 0), (130, 1), (4096, 512)]


@pytest.mark.parametrize("k, n_hi", SIZES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("weight_dtype", [None, *FLOAT_TYPES])
def test_rms_norm_quantize_values(
    k: int, n_hi: int, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    x = (torch.randn(5, k) * torch.randn(5, 1).exp()).to(dtype)
    residual = torch.randn(5, k).to(dtype)
    weight = None if weight_dtype is None else torch.randn(k).to(weight_dtype)
    quantized, new_residual = rms_norm_quantize(x, residual, weight, EPS, n_hi)
    assert bits_equal(new_residual, x + residual)
    assert_quantizes(quantized, *exact_rows(x, residual, weight))
    eight, same = rms_norm_quantize(x, None, weight, EPS, n_hi, lo_bits=8)
    assert same is x
    assert_quantizes(eight, *exact_rows(x, None, weight), lo_bits=8)


def test_rms_norm_quantize_check_rejects_wrong_results() -> None:
    x, weight = torch.randn(4, 512), torch.rand(512) + 0.5
    exact, bound = exact_rows(x, None, weight)
    good, _ = rms_norm_quantize(x, None, weight, EPS, 64)
    assert_quantizes(good, exact, bound)
    one_off = good.q_hi.clone()
    one_off[2, 10] += 1 if one_off[2, 10] < 0 else -1
    layer_norm = torch.nn.functional.layer_norm(x, (512,), weight, None, EPS)
    wrong_eps, _ = rms_norm_quantize(x, None, weight, 2 * EPS, 64)
    for bad in (
        good._replace(q_hi=one_off),
        reference.mixed_quantize(layer_norm, 64),
        wrong_eps,
        rms_norm_quantize(x, None, None, EPS, 64)[0],
    ):
        with pytest.raises(AssertionError):
            assert_quantizes(bad, exact, bound)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rms_norm_quantize_agrees_with_the_reference(dtype: torch.dtype) -> None:
    """Codes differ only where float32 roundings decide a tie: at most one in a thousand."""
    x, residual = torch.randn(2, 16, 2048).to(dtype)
    weight = torch.rand(2048).to(dtype)
    actual, h = rms_norm_quantize(x, residual, weight, EPS, 256)
    expected, expected_h = reference.rms_norm_quantize(x, residual, weight, EPS, 256)
    assert bits_equal(h, expected_h)
    torch.testing.assert_close(actual.params, expected.params, rtol=2e-6, atol=0)
    for a, b in ((actual.q_lo, expected.q_lo), (actual.q_hi, expected.q_hi)):
        difference = (a.int() - b.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_quantize_residual_rounds_like_torch(dtype: torch.dtype) -> None:
    """Sums of every magnitude, subnormal results, overflow to infinity and NaN included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(64, 1024)
    for residual in (x.flip(0), x.flip(1), x * 0.37, x.roll(1, 0)):
        _, new_residual = rms_norm_quantize(x, residual, None, EPS, 0)
        expected = x + residual
        assert torch.equal(new_residual.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert bits_equal(new_residual[numbers], expected[numbers])


def test_rms_norm_quantize_options() -> None:
    x = torch.randn(4, 64)
    plain, _ = rms_norm_quantize(x, None, None, EPS, 8)
    packed, _ = rms_norm_quantize(x, None, None, EPS, 8, packed=True)
    assert_same_mixed(packed, plain._replace(q_lo=pack_int4(plain.q_lo)))
    exact, bound = exact_rows(x, None, None)
    symmetric, _ = rms_norm_quantize(x, None, None, EPS, 8, symmetric=True)
    assert (symmetric.params[:, [1, 3]] == 0).all()
    expected = exact[:, :56].abs().amax(-1) / 7
    error = (symmetric.params[:, 0].double() - expected).abs()
    assert (error <= bound.amax(-1) / 7 + 2 * UNIT * expected).all()
    clipped, _ = rms_norm_quantize(x, None, None, EPS, 8, symmetric=True, clip=0.5)
    assert torch.equal(clipped.params[:, 0], symmetric.params[:, 0] * 0.5)


def test_rms_norm_quantize_extreme_magnitudes() -> None:
    for magnitude in (1e-30, 1e-15, 1.0, 1e15):
        x = torch.randn(3, 100) * magnitude
        for eps in (0.0, 1e-6) if magnitude >= 1e-15 else (1e-6,):
            actual, _ = rms_norm_quantize(x, None, None, eps, 20)
            assert_quantizes(actual, *exact_rows(x, None, None, eps))
    zeros, _ = rms_norm_quantize(torch.zeros(2, 40), None, None, EPS, 8)
    assert_same_mixed(zeros, reference.mixed_quantize(torch.zeros(2, 40), 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rms_norm_quantize_not_finite(value: float) -> None:
    x = torch.randn(3, 90)
    x[1, 70] = value
    actual, _ = rms_norm_quantize(x, None, None, EPS, 10)
    expected, _ = reference.rms_norm_quantize(x, None, None, EPS, 10)
    assert torch.equal(actual.params.isnan(), expected.params.isnan())
    assert actual.params[1, 0].isnan() and not actual.q_lo[1].any()


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (2, 3, 1, 48)])
def test_rms_norm_quantize_batch_shapes(shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    actual, new_residual = rms_norm_quantize(x, residual, None, EPS, 6)
    assert new_residual.shape == shape and actual.q_hi.shape == (*shape[:-1], 6)
    assert_quantizes(actual, *exact_rows(x, residual, None))


def test_rms_norm_quantize_takes_any_strides_and_leaves_its_inputs() -> None:
    x, residual = torch.randn(5, 96, 7).permute(0, 2, 1), torch.randn(7, 5, 96).transpose(0, 1)
    weight = torch.randn(192)[::2]
    before = x.clone(), residual.clone()
    actual, h = rms_norm_quantize(x, residual, weight, EPS, 12)
    dense = (t.contiguous() for t in (x, residual, weight))
    expected, expected_h = rms_norm_quantize(*dense, EPS, 12)
    assert_same_mixed(actual, expected)
    assert bits_equal(h, expected_h)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_rms_norm_quantize_does_not_depend_on_the_batch() -> None:
    x, residual = torch.randn(2, 70, 333)
    whole, h = rms_norm_quantize(x, residual, None, EPS, 33)
    for i in (0, 35, 69):
        row, h_row = rms_norm_quantize(x[i], residual[i], None, EPS, 33)
        assert_same_mixed(row, MixedTensor(*(t[i] for t in whole)))
        assert bits_equal(h_row, h[i])


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    "x, residual, weight, options, sentence",
    [
        (X.long(), None, None, {}, "x: expected float32, float16 or bfloat16, got int64 [2, 8]"),
        (torch.tensor(1.0), None, None, {}, "x: expected at least one dimension"),
        (X, X[:1], None, {}, "residual: expected x's dtype and shape, float32 [2, 8], got"),
        (X, X.half(), None, {}, "residual: expected x's dtype and shape, float32 [2, 8], got"),
        (X, None, X, {}, "weight: expected [8], got float32 [2, 8]"),
        (X, None, X[0, :4], {}, "weight: expected [8], got float32 [4]"),
        (X, None, X[0].int(), {}, "weight: expected float32, float16 or bfloat16, got int32 [8]"),
        (X, None, None, {"eps": -1.0}, "eps: expected 0 or more, got -1"),
        (X, None, None, {"n_hi": 9}, "n_hi: expected 0 to 8"),
        (X, None, None, {"lo_bits": 2}, "lo_bits: expected 4 or 8, got 2"),
        (X, None, None, {"n_hi": 1, "packed": True}, "packed: expected an even number"),
    ],
)
def test_rms_norm_quantize_errors(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    options: dict,
    sentence: str,
) -> None:
    with pytest.raises(RuntimeError) as error:
        rms_norm_quantize(x, residual, weight, **{"eps": EPS, "n_hi": 0, **options})
    assert f"rms_norm_quantize: {sentence}" in str(error.value)


def test_rms_norm_quantize_opcheck() -> None:
    for dtype in FLOAT_TYPES:
        x, residual = torch.randn(2, 3, 48).to(dtype)
        for arguments in ((x, residual, x[0]), (x, None, None)):
            torch.library.opcheck(
                torch.ops.resq.rms_norm_quantize.default, (*arguments, EPS, 6), {"packed": True}
            )


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_quantize_compiles(with_residual: bool) -> None:
    def norm(x: torch.Tensor) -> tuple[MixedTensor, torch.Tensor]:
        return rms_norm_quantize(x * 2, x if with_residual else None, None, EPS, 6)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 48)
        (actual, h), (expected, expected_h) = compiled(x), norm(x)
        assert_same_mixed(actual, expected)
        assert bits_equal(h, expected_h)
