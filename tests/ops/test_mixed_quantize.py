"""mixed_quantize against reference.mixed_quantize, bit for bit."""

from __future__ import annotations

import pytest
import torch
from mixed_check import FLOAT_TYPES, assert_same_mixed

from resq_kernels import reference
from resq_kernels.formats import MixedTensor
from resq_kernels.ops import mixed_quantize

SIZES = [(256, 32), (64, 8), (37, 5), (10, 0), (9, 9), (1, 0), (0, 0), (1000, 125), (4096, 512)]


def assert_exact(x: torch.Tensor, n_hi: int, **options) -> MixedTensor:
    actual = mixed_quantize(x, n_hi, **options)
    assert_same_mixed(actual, reference.mixed_quantize(x, n_hi, **options))
    return actual


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("k, n_hi", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_quantize_is_exact(dtype: torch.dtype, k: int, n_hi: int, symmetric: bool) -> None:
    x = (torch.randn(7, k) * torch.randn(7, 1).exp() + torch.randn(7, 1)).to(dtype)
    for clip in (1.0, 0.9):
        assert_exact(x, n_hi, symmetric=symmetric, clip=clip)
        assert_exact(x, n_hi, symmetric=symmetric, clip=clip, lo_bits=8)
        if (k - n_hi) % 2 == 0:
            assert_exact(x, n_hi, symmetric=symmetric, clip=clip, packed=True)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_high_part_is_not_clipped(symmetric: bool) -> None:
    x = torch.randn(9, 96)
    whole = mixed_quantize(x, 32, symmetric=symmetric)
    clipped = mixed_quantize(x, 32, symmetric=symmetric, clip=0.5)
    assert torch.equal(clipped.q_hi, whole.q_hi)
    assert torch.equal(clipped.params[:, 2:], whole.params[:, 2:])
    assert torch.equal(clipped.params[:, 0], whole.params[:, 0] * 0.5)


@pytest.mark.parametrize("k_lo", range(2, 200, 2))
def test_mixed_quantize_packs_any_even_width(k_lo: int) -> None:
    x = torch.randn(3, k_lo + 3)
    assert_exact(x, 3, packed=True)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_quantize_extreme_magnitudes(dtype: torch.dtype, symmetric: bool) -> None:
    finite = torch.finfo(dtype)
    magnitudes = [finite.smallest_normal / 8, finite.tiny, 1e-20, 1e-6, 1.0, finite.max / 4]
    magnitudes = torch.tensor(magnitudes, dtype=torch.float64)
    x = (torch.rand(6, 100, dtype=torch.float64) * 2 - 1) * magnitudes[:, None]
    for rows in (x, x.abs(), -x.abs(), x * 0, -(x * 0)):
        assert_exact(rows.to(dtype), 20, symmetric=symmetric)
    full = torch.full((1, 40), finite.max, dtype=dtype)
    full[:, ::2] *= -1  # in float32 the span of the row overflows
    assert_exact(full, 8, symmetric=symmetric)


def test_mixed_quantize_rounds_half_to_even() -> None:
    halves = torch.arange(-7.5, 8.0, 1.0)  # scale 1, every product a tie
    actual = assert_exact(halves.unsqueeze(0), 0)
    assert actual.params[0, 0] == 1.0
    assert actual.params[0, 1] == 0.0
    assert actual.q_lo[0, :4].tolist() == [-8, -6, -6, -4]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_mixed_quantize_marks_rows_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    k, n_hi = 90, 20
    x = torch.randn(k + 1, k).to(dtype)
    for i in range(k):  # every position once, the last row stays finite
        x[i, i] = value
    for packed in (False, True):
        actual = assert_exact(x, n_hi, packed=packed)
        bad_lo, bad_hi = actual.params[:, 0].isnan(), actual.params[:, 2].isnan()
        assert bad_lo.tolist() == [i < k - n_hi for i in range(k + 1)]
        assert bad_hi.tolist() == [k - n_hi <= i < k for i in range(k + 1)]
        assert not actual.q_lo[bad_lo].any() and not actual.q_hi[bad_hi].any()
        assert actual.dequantize()[bad_lo][:, : k - n_hi].isnan().all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,), (2, 3, 1, 64), (1, 64), (5, 7, 64)])
def test_mixed_quantize_batch_shapes(shape: tuple[int, ...]) -> None:
    actual = assert_exact(torch.randn(shape), 8, packed=True)
    assert actual.q_lo.shape == (*shape[:-1], 28)
    assert actual.params.shape == (*shape[:-1], 4)


def test_mixed_quantize_takes_any_strides() -> None:
    x = torch.randn(6, 5, 128)
    for view in (
        x.transpose(0, 1),
        x[..., ::2],
        x[:, 1:4, 3:99],
        x[0, 0].expand(4, 128),
        x.permute(2, 1, 0),
        torch.randn(130)[1:129],
    ):
        assert_exact(view, 1)


def test_mixed_quantize_does_not_depend_on_the_batch() -> None:
    x = torch.randn(300, 512)
    whole = mixed_quantize(x, 64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_mixed(mixed_quantize(x, 64), whole)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 299):
        assert_same_mixed(mixed_quantize(x[i], 64), MixedTensor(*(t[i] for t in whole)))


@pytest.mark.parametrize(
    "x, options, sentence",
    [
        (torch.zeros(2, 8, dtype=torch.int32), {}, "x: expected float32, float16 or bfloat16"),
        (torch.tensor(1.0), {}, "x: expected at least one dimension"),
        (torch.zeros(2, 8), {"n_hi": 9}, "n_hi: expected 0 to 8 (the columns of a row), got 9"),
        (torch.zeros(2, 8), {"n_hi": -1}, "n_hi: expected 0 to 8 (the columns of a row), got -1"),
        (torch.zeros(2, 8), {"lo_bits": 3}, "lo_bits: expected 4 or 8, got 3"),
        (torch.zeros(2, 8), {"clip": 0.0}, "clip: expected a factor in (0, 1], got 0"),
        (torch.zeros(2, 8), {"clip": 1.5}, "clip: expected a factor in (0, 1], got 1.5"),
        (torch.zeros(2, 8), {"clip": float("nan")}, "clip: expected a factor in (0, 1]"),
        (torch.zeros(2, 8), {"lo_bits": 8, "packed": True}, "packed: expected False with lo_bits"),
        (torch.zeros(2, 7), {"packed": True}, "packed: expected an even number of low columns"),
    ],
)
def test_mixed_quantize_errors(x: torch.Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        mixed_quantize(x, **{"n_hi": 0, **options})
    assert f"mixed_quantize: {sentence}" in str(error.value)


@pytest.mark.parametrize("packed", [None, False, True])
def test_mixed_quantize_opcheck(packed: bool | None) -> None:
    for dtype in FLOAT_TYPES:
        torch.library.opcheck(
            torch.ops.resq.mixed_quantize.default,
            (torch.randn(3, 32).to(dtype), 4),
            {"packed": packed, "symmetric": True, "clip": 0.9},
        )


def test_mixed_quantize_compiles() -> None:
    compiled = torch.compile(
        lambda x: mixed_quantize(x * 2, 8, packed=True), fullgraph=True, backend="aot_eager"
    )
    for rows in (3, 5, 1):
        x = torch.randn(rows, 64)
        assert_same_mixed(compiled(x), mixed_quantize(x * 2, 8, packed=True))
