"""rms_norm against its float64 evaluation."""

from __future__ import annotations

import pytest
import torch
from mixed_check import FLOAT_TYPES, bits_equal
from rms_norm_exact import EPS, assert_normalizes

from resq_kernels import reference
from resq_kernels.ops import rms_norm, rms_norm_quantize


@pytest.mark.parametrize("k", [1, 7, 37, 130, 576, 1024, 4096, 5000])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("weight_dtype", [None, *FLOAT_TYPES])
def test_values(k: int, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    x = (torch.randn(5, k) * torch.randn(5, 1).exp()).to(dtype)
    weight = None if weight_dtype is None else torch.randn(k).to(weight_dtype)
    assert_normalizes(rms_norm(x, weight, EPS), x, weight)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_the_check_rejects_wrong_results(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 512).to(dtype), torch.rand(512) + 0.5
    good = rms_norm(x, weight, EPS)
    assert_normalizes(good, x, weight)
    one_off = good.clone()
    one_off[2, 10] *= 1 + 16 * torch.finfo(dtype).eps
    layer_norm = torch.nn.functional.layer_norm(x.float(), (512,), weight, None, EPS).to(dtype)
    for bad in (one_off, layer_norm, rms_norm(x, weight, 0.1), rms_norm(x, None, EPS)):
        with pytest.raises(AssertionError):
            assert_normalizes(bad, x, weight)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_it_agrees_with_the_reference(dtype: torch.dtype) -> None:
    """But for numbers that a rounding of float32 puts on the other side of a tie."""
    x, weight = torch.randn(16, 2048).to(dtype), torch.rand(2048).to(dtype)
    actual, expected = rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)
    steps = 16 if dtype == torch.float32 else 2  # of float32 both may be several away
    torch.testing.assert_close(actual, expected, rtol=steps * torch.finfo(dtype).eps, atol=0)
    if dtype != torch.float32:
        assert (actual != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_it_is_what_rms_norm_quantize_rounds(dtype: torch.dtype) -> None:
    """In float32, quantized, to the bit: one order of the sum."""
    x, weight = torch.randn(7, 333).to(dtype), torch.randn(333)
    codes, _ = rms_norm_quantize(x, None, weight, EPS, 33)
    again, _ = rms_norm_quantize(x.float(), None, weight, EPS, 33)
    normed = rms_norm(x.float(), weight, EPS)
    assert all(map(bits_equal, codes, again))
    span = normed[:, :300].amax(1).clamp_min(0) - normed[:, :300].amin(1).clamp_max(0)
    assert bits_equal(codes.params[:, 0], span / 15)


def test_extreme_magnitudes() -> None:
    for magnitude in (1e-30, 1e-15, 1.0, 1e15):
        x = torch.randn(3, 100) * magnitude
        for eps in (0.0, 1e-6) if magnitude >= 1e-15 else (1e-6,):
            assert_normalizes(rms_norm(x, None, eps), x, None, eps)
    assert not rms_norm(torch.zeros(2, 40), None, EPS).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    x = torch.randn(3, 90)
    x[1, 70] = value
    actual, expected = rms_norm(x, None, EPS), reference.rms_norm(x, None, EPS)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[1, 70].isnan() and actual[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (2, 3, 1, 48)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    actual = rms_norm(x, None, EPS)
    assert actual.shape == shape and actual.is_contiguous()
    assert_normalizes(actual, x, None)


def test_any_strides_and_the_inputs_stay() -> None:
    x, weight = torch.randn(5, 96, 7).permute(0, 2, 1), torch.randn(192)[::2]
    before = x.clone()
    actual = rms_norm(x, weight, EPS)
    assert bits_equal(actual, rms_norm(x.contiguous(), weight.contiguous(), EPS))
    assert torch.equal(x, before)


def test_a_row_does_not_depend_on_the_batch() -> None:
    x = torch.randn(70, 333)
    whole = rms_norm(x, None, EPS)
    for i in (0, 35, 69):
        assert bits_equal(rms_norm(x[i], None, EPS), whole[i])


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    "x, weight, eps, sentence",
    [
        (X.long(), None, EPS, "x: expected float32, float16 or bfloat16, got int64 [2, 8]"),
        (torch.tensor(1.0), None, EPS, "x: expected at least one dimension"),
        (X, X, EPS, "weight: expected [8], got float32 [2, 8]"),
        (X, X[0, :4], EPS, "weight: expected [8], got float32 [4]"),
        (X, X[0].int(), EPS, "weight: expected float32, float16 or bfloat16, got int32 [8]"),
        (X, None, -1.0, "eps: expected 0 or more, got -1"),
        (X, None, float("nan"), "eps: expected 0 or more, got nan"),
    ],
)
def test_errors(x: torch.Tensor, weight: torch.Tensor | None, eps: float, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        rms_norm(x, weight, eps)
    assert f"rms_norm: {sentence}" in str(error.value)


def test_opcheck() -> None:
    for dtype in FLOAT_TYPES:
        x = torch.randn(2, 3, 48).to(dtype)
        for weight in (None, x[0, 0]):
            torch.library.opcheck(torch.ops.resq.rms_norm.default, (x, weight, EPS))


def test_compiles() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x * 2, None, EPS)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 48)
        assert bits_equal(compiled(x), norm(x))
