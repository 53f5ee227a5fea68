"""Round-to-nearest weight quantization, and what holds its codes."""

import pytest
import torch

from resq_kernels import ops
from resq_kernels.formats import PackedWeight, QuantizedWeight, unpack_int4, weight_sums
from resq_kernels.weights import quantize_weight


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


def random_weight(n: int, k_lo: int, k_hi: int) -> QuantizedWeight:
    lo = torch.randint(0, 256, (n, k_lo // 2), dtype=torch.uint8)
    hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
    return QuantizedWeight(lo, hi, torch.rand(n, 2))


def same(left: PackedWeight, right: PackedWeight) -> bool:
    tensors = zip(left[:3], right[:3], strict=True)
    return left[3:] == right[3:] and all(torch.equal(a, b) for a, b in tensors)


def test_dequantize_is_scale_times_code() -> None:
    weight = random_weight(5, 12, 4)
    codes = torch.cat([unpack_int4(weight.weight_lo), weight.weight_hi], dim=1)
    assert codes[:, :12].min() == -8 and codes[:, :12].max() == 7
    scale = weight.weight_scale.repeat_interleave(torch.tensor([12, 4]), dim=1)
    assert torch.equal(weight.dequantize(), codes * scale)


@pytest.mark.parametrize(("k_lo", "k_hi"), [(56, 8), (30, 0), (0, 17), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 33, 64, 200])
def test_packing_keeps_codes_and_scale(n: int, k_lo: int, k_hi: int) -> None:
    weight = random_weight(n, k_lo, k_hi)
    packed = PackedWeight.pack(weight)
    assert (packed.n, packed.k_lo, packed.k_hi) == (n, k_lo, k_hi)
    assert torch.equal(packed.data, ops.pack_weight(*weight[:2]))
    assert torch.equal(packed.sums, weight_sums(*weight[:2]))
    for mine, given in zip(packed.codes(), weight, strict=True):
        assert torch.equal(mine, given)


@pytest.mark.parametrize(("k_lo", "k_hi"), [(56, 8), (30, 0), (0, 17)])
@pytest.mark.parametrize("rows", [[64], [128, 64, 64], [64, 1], [64, 0, 37], [100, 64], [1] * 3])
def test_cat_and_split_are_the_rows_packed_together_and_apart(
    rows: list[int], k_lo: int, k_hi: int
) -> None:
    weights = [random_weight(n, k_lo, k_hi) for n in rows]
    whole = QuantizedWeight(*(torch.cat(parts) for parts in zip(*weights, strict=True)))
    joined = PackedWeight.cat([PackedWeight.pack(weight) for weight in weights])
    assert same(joined, PackedWeight.pack(whole))
    parts = joined.split(rows)
    assert all(same(a, PackedWeight.pack(b)) for a, b in zip(parts, weights, strict=True))
    shared = {part.data.untyped_storage().data_ptr() for part in parts if part.n}
    aligned = not any(n % 64 for n in rows[:-1])
    assert (joined.data.untyped_storage().data_ptr() in shared) == aligned


def test_sums_of_packed_codes_are_exact() -> None:
    lo = torch.tensor([0x88, 0x77, 0x97], dtype=torch.uint8)[:, None].repeat(1, 1 << 15)
    hi = torch.tensor([-128, 127, -127], dtype=torch.int8)[:, None].repeat(1, 1 << 16)
    scale = torch.rand(3, 2)
    lo[2, 5] = 0x67  # 6 and 7 in the place of -7 and 7
    hi[2, 7] = -126
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        with torch.device("meta"):  # what a caller makes its default is not where weights are
            packed = PackedWeight.pack(QuantizedWeight(lo, hi, scale))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = [[-8 << 16, -128 << 16], [7 << 16, 127 << 16], [13, (-127 << 16) + 1]]
    assert packed.sums.tolist() == expected
    assert packed.sums.dtype == torch.int32 and packed.sums.is_contiguous()


def test_row_sums_of_all_codes() -> None:
    lo = torch.arange(256, dtype=torch.uint8)[:, None]  # a pair of codes a row
    hi = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    signed = torch.tensor([*range(8), *range(-8, 0)])  # of a nibble
    expected = signed[torch.arange(256) & 15] + signed[torch.arange(256) >> 4]
    sums = weight_sums(lo, hi)
    assert sums.dtype == torch.int32
    assert torch.equal(sums, torch.stack([expected, hi[:, 0].int()], dim=1).int())
    rows = torch.full((2, 20_000), 0x88, dtype=torch.uint8), torch.full((2, 0), 1, dtype=torch.int8)
    assert weight_sums(*rows).tolist() == [[-16 * 20_000, 0]] * 2
