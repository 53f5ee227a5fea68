"""search_scale against every range of the grid in float64, and the rows that have no search."""

from __future__ import annotations

import pytest
import torch

from resq_kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the errors of two ranges: the powers are within 1e-6, and so are float32 sums of 16 parts.
TOLERANCE = 1e-5


def rounding(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """By how much the roundings of w / scale change the error of a row: three, of 2^-24 each.

    It matters where a row has few columns, whose codes can hit all of them nearly.
    """
    half, weight, step = 2 ** (bits - 1), weight.double(), scale.double().unsqueeze(-1)
    quotients = weight / step
    off = (torch.round(quotients).clamp(-half, half - 1) - quotients).abs()
    moved = quotients.abs() * 3 * 2.0**-24
    return (((off + moved).pow(2.4) - off.pow(2.4)) * step**2.4).sum(-1)


def errors(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The 2.4-norm errors of rows [..., K] with scales [...], in float64."""
    half, weight, step = 2 ** (bits - 1), weight.double(), scale.double().unsqueeze(-1)
    codes = torch.round(weight / step).clamp(-half, half - 1)
    return (codes * step - weight).abs().pow(2.4).sum(-1)


def assert_best(weight: torch.Tensor, bits: int) -> None:
    """The scale is one of the grid, and none of the grid has a smaller error."""
    scale, best = ops.search_scale(weight, bits), reference.search_scale(weight, bits)
    assert scale.dtype == torch.float32 and scale.shape == weight.shape[:-1]
    steps = scale.double() * (2 ** (bits - 1) - 1) / weight.double().abs().amax(-1) * 100
    nearest = steps.round()
    torch.testing.assert_close(steps, nearest, rtol=1e-6, atol=0)
    assert nearest.min() >= 21 and nearest.max() <= 100
    found, smallest = errors(weight, scale, bits), errors(weight, best, bits)
    slack = rounding(weight, scale, bits) + rounding(weight, best, bits)
    assert (found <= smallest * (1 + TOLERANCE) + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tail", [1.0, 2.0, 30.0])
@pytest.mark.parametrize("columns", [1, 3, 16, 33, 515])
def test_no_range_of_the_grid_is_better(
    columns: int, tail: float, bits: int, dtype: torch.dtype
) -> None:
    """Student's t: heavy tails with 1 degree of freedom, Gaussian with 30."""
    weight = torch.distributions.StudentT(tail).sample((200, columns)).clamp(-6e4, 6e4)
    weight[40, 1:] = 0
    assert_best(weight.to(dtype), bits)


def test_the_range_next_to_the_best_is_told_apart() -> None:
    weight = torch.randn(300, 4096)
    best = reference.search_scale(weight, 4)
    step = weight.abs().amax(1) / 7 / 100
    next_to_it = torch.stack([errors(weight, best + sign * step, 4) for sign in (-1, 1)])
    apart = next_to_it.amin(0) / errors(weight, best, 4) - 1
    slack = 2 * rounding(weight, best, 4) / errors(weight, best, 4)
    assert (apart > TOLERANCE + slack).float().mean() > 0.9
    found = ops.search_scale(weight, 4)
    assert torch.isclose(found, best, rtol=1e-4, atol=0).float().mean() > 0.99


def test_an_outlier_is_clipped_where_it_pays() -> None:
    weight = torch.randn(20, 5000) / 10
    weight[:, 7] = 1 + torch.rand(20)  # not worth a range of its size
    assert_best(weight, 4)
    assert (ops.search_scale(weight, 4) * 7 / weight.abs().amax(1) < 0.5).all()
    few = torch.randn(12, 96) * torch.rand(12, 1).exp()
    scale = ops.search_scale(few, 4)
    assert (scale < 0.95 * few.abs().amax(1) / 7).sum() > 6


def test_codes_that_hit_every_weight_keep_the_whole_range() -> None:
    codes = torch.randint(-7, 8, (50, 64)).float()
    codes[:, 0] = 7
    scale = torch.rand(50, 1).exp()
    got = ops.search_scale(codes * scale, 4)
    torch.testing.assert_close(got, scale[:, 0], rtol=2**-22, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_of_weights_do_not_matter(bits: int) -> None:
    """Powers of two change nothing but the scale, where nothing is below the normal numbers."""
    weight = torch.randn(40, 130).clamp(-3.9, 3.9)
    scale = ops.search_scale(weight, bits)
    for exponent in (-90, -60, 100, 120):
        assert torch.equal(ops.search_scale(weight * 2.0**exponent, bits), scale * 2.0**exponent), (
            exponent
        )


def test_rows_without_a_search() -> None:
    weight = torch.randn(5, 40)
    weight[0] = 0
    weight[1, 39], weight[2, 0], weight[3, 17] = torch.nan, torch.inf, -torch.inf
    for bits in (4, 8):
        scale = ops.search_scale(weight, bits)
        assert scale[0] == 1 and scale[1:4].isnan().all()
        assert scale[4] == ops.search_scale(weight[4], bits)
    tiny = torch.zeros(1, 8)
    tiny[0, 3] = 2.0**-130
    assert ops.search_scale(tiny, 4) == torch.tensor(2.0**-130) / 7


def test_views_and_leading_dimensions() -> None:
    weight = torch.randn(3, 7, 96)
    flat = weight.reshape(21, 96)
    assert torch.equal(ops.search_scale(weight, 4), ops.search_scale(flat, 4).view(3, 7))
    for view in (flat[:, :50], flat[::2, 5:], flat.T):
        assert torch.equal(ops.search_scale(view, 4), ops.search_scale(view.contiguous(), 4))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
def test_nothing_to_search(shape: tuple[int, ...]) -> None:
    assert torch.equal(ops.search_scale(torch.empty(shape), 4), torch.zeros(shape[:-1]))


def test_threads_change_nothing() -> None:
    weight = torch.randn(500, 300)
    together = ops.search_scale(weight, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.search_scale(weight, 4), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack([ops.search_scale(row, 4) for row in weight]), together)


@pytest.mark.parametrize(
    ("weight", "bits", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 4, "weight: expected float32, float16 or bfloat"),
        (torch.zeros(2, 8, dtype=torch.int8), 4, "weight: expected float32, float16 or bfloat16"),
        (torch.tensor(1.0), 4, "weight: expected at least one dimension"),
        (torch.zeros(2, 8), 5, "bits: expected 4 or 8, got 5"),
        (torch.zeros(2, 8, requires_grad=True), 4, "weight: expected a tensor that needs no grad"),
    ],
)
def test_what_is_refused(weight: torch.Tensor, bits: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"search_scale: {words}"):
        ops.search_scale(weight, bits)


def test_opcheck() -> None:
    op = torch.ops.resq.search_scale.default
    for weight in (torch.randn(4, 5, 33), torch.randn(3, 16).half(), torch.empty(0, 4)):
        torch.library.opcheck(op, (weight, 4))
