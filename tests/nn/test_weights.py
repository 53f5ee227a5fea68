"""Round-to-nearest weight quantization against a float64 search."""

import pytest
import torch

from resq_kernels.formats import unpack_int4
from resq_kernels.weights import quantize_weight, search_scale


def brute_force(row: torch.Tensor, bits: int) -> float:
    """The smallest 2.4-norm error of one row over the grid of ranges, in float64."""
    half = 2 ** (bits - 1)
    row = row.double()
    errors = []
    for percent in range(21, 101):
        scale = row.abs().max() * (percent / 100) / (half - 1)
        codes = torch.round(row / scale).clamp(-half, half - 1)
        errors.append((codes * scale - row).abs().pow(2.4).sum().item())
    return min(errors)


@pytest.mark.parametrize("bits", [4, 8])
def test_search_finds_the_best_range(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(12, 96) * torch.rand(12, 1).exp()
    weight[3, 5] = 8.0  # an outlier: at 4 bits it is better clipped
    half = 2 ** (bits - 1)
    scale = search_scale(weight, bits)
    codes = torch.round(weight / scale[:, None]).clamp(-half, half - 1)
    errors = (codes * scale[:, None] - weight).double().abs().pow(2.4).sum(1)
    best = torch.tensor([brute_force(row, bits) for row in weight], dtype=torch.float64)
    # The float32 sum is exact to 1e-5; the range next to the best is off by more in most rows.
    torch.testing.assert_close(errors, best, rtol=1e-4, atol=0)
    unclipped = weight.abs().amax(1) / (half - 1)
    assert bits == 8 or (scale < 0.95 * unclipped).sum() > 6
    assert (scale <= unclipped).all()


@pytest.mark.parametrize("high_columns", [0, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_weight(high_columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(high_columns)
    weight = torch.randn(5, 64).to(dtype)
    weight_lo, weight_hi, scale = quantize_weight(weight, high_columns)
    k_lo = 64 - high_columns
    assert weight_lo.shape == (5, k_lo // 2) and weight_lo.dtype == torch.uint8
    assert weight_hi.shape == (5, high_columns) and weight_hi.dtype == torch.int8
    assert scale.shape == (5, 2) and scale.dtype == torch.float32
    error = (
        torch.cat([unpack_int4(weight_lo), weight_hi], dim=1)
        * scale.repeat_interleave(torch.tensor([k_lo, high_columns]), dim=1)
        - weight.float()
    )
    # Without clipping the error of a uniform step is step / sqrt(12); the search only improves it.
    for part, bits in [(slice(0, k_lo), 4), (slice(k_lo, 64), 8)]:
        if part.stop > part.start:
            step = weight[:, part].float().abs().amax(1) / (2 ** (bits - 1) - 1)
            rms = error[:, part].square().mean(1).sqrt()
            assert (rms < 1.25 * step / 12**0.5).all()
            assert (rms > 0.3 * step / 12**0.5).all()


def test_a_zero_row_has_zero_codes_and_scale_one() -> None:
    weight_lo, weight_hi, scale = quantize_weight(torch.zeros(2, 16), 4)
    assert not weight_lo.any() and not weight_hi.any()
    torch.testing.assert_close(scale, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("weight", "high_columns", "words"),
    [
        (torch.zeros(4), 0, "expected a floating matrix"),
        (torch.zeros(4, 4, dtype=torch.int8), 0, "got torch.int8"),
        (torch.zeros(2, 8), 3, "even number of the 8 columns"),
        (torch.zeros(2, 8), 10, "got 10"),
        (torch.full((2, 8), torch.nan), 2, "got NaN or infinity"),
    ],
)
def test_bad_input(weight: torch.Tensor, high_columns: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_weight(weight, high_columns)
