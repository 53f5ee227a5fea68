"""csrc/core/{int4,quantize,float16}.h and the SIMD operations, over every input if it can be."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from resq_kernels import formats, reference

# In order: each machine has those up to its best. AMX adds tiles and no others.
INSTRUCTION_SETS = ["scalar", "avx2", "avx512vnni", "amx"]
HALVES = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(params=INSTRUCTION_SETS[:-1])
def simd(core: ModuleType, request: pytest.FixtureRequest) -> Any:
    best = torch.ops.resq.cpu_isa()
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"the library runs {best} here")
    return core.simd_ops(request.param)


def as_torch(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


def test_int4_codes_round_trip(core: ModuleType) -> None:
    codes = np.arange(-8, 8, dtype=np.int8)
    even, odd = (part.ravel() for part in np.meshgrid(codes, codes))
    packed = core.pack_int4(even, odd)
    assert sorted(packed) == list(range(256))  # a bijection
    assert (core.unpack_int4_even(packed) == even).all()
    assert (core.unpack_int4_odd(packed) == odd).all()
    pairs = torch.from_numpy(np.stack([even, odd], axis=1))
    assert torch.equal(formats.pack_int4(pairs)[:, 0], torch.from_numpy(packed))
    assert torch.equal(formats.unpack_int4(torch.from_numpy(packed)[:, None]), pairs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scale_and_zero_are_those_of_the_reference(
    core: ModuleType, bits: int, symmetric: bool
) -> None:
    ends = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-18, -1e-18, 0.3, -0.3, 1.0, -1.0, 7.5, -7.5]
    ends += [1e4, -1e4, 1e30, -1e30, 3e38, -3e38, *np.random.default_rng().normal(size=6)]
    scale_of = core.symmetric_scale if symmetric else core.asymmetric_scale
    rows = torch.tensor([(a, b) for a in ends for b in ends], dtype=torch.float32)
    _, scale, zero = reference.ops._quantize_part(rows, bits, symmetric, 1.0)
    for (a, b), s, z in zip(rows.tolist(), scale.tolist(), zero.tolist(), strict=True):
        assert scale_of(min(a, b), max(a, b), bits) == (s, z), (a, b)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_code_of_every_float16(core: ModuleType, bits: int) -> None:
    x = as_torch(HALVES, torch.float16).float()
    x = x[x.isfinite()]
    half = 2 ** (bits - 1)
    scales = [1.0, 2.0, 0.1, 1 / 3, 65504 / 7, 2.0**-14, 2.0**-24, 2.0**-60]
    for scale in scales:
        for zero in (0.0, -half, half - 1.0, 3.0):
            inverse = 1.0 / torch.tensor(scale)
            expected = (torch.round(x * inverse) + zero).clamp(-half, half - 1).to(torch.int8)
            codes = core.quantize_code(x.numpy(), inverse.item(), zero, bits)
            assert torch.equal(torch.from_numpy(codes), expected), (scale, zero)


def test_quantize_code_rounds_half_to_even(core: ModuleType) -> None:
    halves = np.arange(-7.5, 7.0, dtype=np.float32)
    assert core.quantize_code(halves, 1.0, 0.0, 4).tolist() == [
        *(-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6)
    ]


@pytest.mark.parametrize("name, dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_16_bit_number_widens(simd: Any, name: str, dtype: torch.dtype) -> None:
    expected = as_torch(HALVES, dtype).float().numpy()
    actual = getattr(simd, f"from_{name}")(HALVES)[: len(HALVES)]
    assert (np.isnan(actual) == np.isnan(expected)).all()
    numbers = ~np.isnan(expected)
    assert (actual.view(np.uint32) == expected.view(np.uint32))[numbers].all()


@pytest.mark.parametrize("name, dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_rounding_to_16_bits(simd: Any, name: str, dtype: torch.dtype) -> None:
    """Every number, every middle between neighbours (a tie) and the floats around both."""
    numbers = as_torch(HALVES, dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    middles = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    overflow = torch.tensor([65519.996, 65520.0, 65536.0, 3.39e38, 3.4e38])
    x = torch.cat([numbers, middles, overflow, -overflow, torch.randn(10**5)])
    x = torch.cat([x.nextafter(torch.tensor(torch.inf)), x, x.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])])
    actual = torch.from_numpy(getattr(simd, f"to_{name}")(x.numpy()).view(np.int16))[: len(x)]
    assert torch.equal(actual, x.to(dtype).view(torch.int16))
    nans = np.full(16, np.nan, dtype=np.float32)
    assert as_torch(getattr(simd, f"to_{name}")(nans), dtype)[:16].isnan().all()


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rows_end_where_they_should(simd: Any, name: str, count: int) -> None:
    """Loading pads with zeros up to a whole vector, storing writes nothing past the row."""
    bits = np.random.default_rng().integers(1, 0x7000, count, dtype=np.uint16)
    whole = -(-count // simd.lanes) * simd.lanes
    loaded = getattr(simd, f"from_{name}")(bits)
    assert (loaded[:count] != 0).all() and (loaded[count:whole] == 0).all()
    assert (loaded[whole:].view(np.uint32) == 0x55555555).all()
    stored = getattr(simd, f"to_{name}")(loaded[:count])
    assert (stored[:count] == bits).all() and (stored[count:] == 0x5555).all()


def test_min_and_max_take_the_second_operand_where_one_is_nan(simd: Any) -> None:
    values = np.array([-np.inf, -2, -0.0, 0.0, 1.5, np.inf, np.nan, 1e-40], dtype=np.float32)
    a, b = (grid.ravel() for grid in np.meshgrid(values, values))
    for name, first in (("min", a < b), ("max", a > b)):
        actual, expected = getattr(simd, name)(a, b), np.where(first, a, b)
        assert (actual.view(np.uint32) == expected.view(np.uint32)).all(), name


def test_dot_pairs_are_exact_modulo_2_to_the_32(simd: Any) -> None:
    ends = [0, 1, -1, 32767, -32768]
    draw = np.random.default_rng().integers(-32768, 32768, (4, 4096))
    draw[:, : len(ends) ** 4] = np.stack(np.meshgrid(*[ends] * 4)).reshape(4, -1)
    low_a, high_a, low_b, high_b = draw
    sums = np.random.default_rng().integers(-(2**31), 2**31, 4096)

    def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return ((low & 0xFFFF) | (high & 0xFFFF) << 16).astype(np.uint32).view(np.int32)

    actual = simd.dot_pairs(sums.astype(np.int32), pairs(low_a, high_a), pairs(low_b, high_b))
    expected = (sums + low_a * low_b + high_a * high_b) % 2**32
    assert (actual.view(np.uint32) == expected).all()


def test_integers_are_exact(simd: Any) -> None:
    x = np.concatenate([np.arange(-4096, 4096) / 2, np.random.default_rng().normal(0, 2e5, 8192)])
    x = np.concatenate([x, [2.0**22 - 0.5, -(2.0**22) + 0.5] * 8]).astype(np.float32)
    assert (simd.round_to_int(x) == np.round(x)).all()
    assert (simd.to_int8(np.arange(-128, 128, dtype=np.float32)) == np.arange(-128, 128)).all()
    exponents = np.arange(-127, 129)
    assert (simd.exp2_int(exponents)[1:-1] == np.exp2(exponents[1:-1].astype(np.float64))).all()
    assert simd.exp2_int(exponents)[0] == 0


def test_round_is_half_to_even(simd: Any) -> None:
    x = np.concatenate([np.arange(-4096, 4096) / 2, np.random.default_rng().normal(0, 99, 10**5)])
    x = x[: len(x) // 16 * 16].astype(np.float32)
    assert (simd.round(x) == np.round(x)).all()


def every_float(low: float, high: float, stride: int) -> np.ndarray:
    """Every stride-th float between low and high > 0, both signs in turn, a multiple of 16."""
    first, last = (int(np.float32(end).view(np.uint32)) for end in (low, high))
    x = np.arange(first, last, stride, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, -x])
    return x[: len(x) // 16 * 16]


def test_exp_is_within_its_bound(simd: Any) -> None:
    """Relative error below 1.3e-7 wherever the result is above 2^-125."""
    x = every_float(1e-9, 86.9, stride=997)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(simd.exp(x) / exact - 1).max()
    assert 2.0**-25 < error < 1.3e-7  # no float32 result can be better than half an ulp
    ends = np.array([88.7, 88.73, 1e4, np.inf, -87.1, -104.0, -1e4, -np.inf], dtype=np.float32)
    actual = simd.exp(np.concatenate([ends, np.full(8, np.nan, dtype=np.float32)]))
    assert abs(actual[0] / np.exp(np.float64(ends[0])) - 1) < 1.3e-7
    assert actual[1:8].tolist() == [np.inf, np.inf, np.inf, 0, 0, 0, 0]
    assert np.isnan(actual[8:]).all()


def test_silu_is_within_its_bound(simd: Any) -> None:
    """Relative error below 2.5e-7 down to x = -87; below that the result is under 1e-36."""
    x = every_float(1e-30, 87.0, stride=1999)
    exact = x / (1 + np.exp(-x.astype(np.float64)))
    error = np.abs(simd.silu(x) / exact - 1).max()
    assert 2.0**-25 < error < 2.5e-7
    ends = np.array([-88.0, -89.0, -1e4, -3e38, 88.0, 3e38, 0.0, -0.0] * 2, dtype=np.float32)
    actual = simd.silu(ends)
    exact = np.array([-88 * np.exp(-88.0), -89 * np.exp(-89.0), 0, 0, 88, 3e38, 0, 0] * 2)
    assert (np.abs(actual - exact) <= 1.3e-7 * np.abs(exact) + 3e-37).all()
    assert np.isnan(simd.silu(np.full(16, np.nan, dtype=np.float32))).all()
    assert np.isnan(simd.silu(np.full(16, -np.inf, dtype=np.float32))).all()


def test_simd_ops_agree_bit_for_bit(simd: Any, core: ModuleType) -> None:
    x = np.concatenate([every_float(1e-38, 3e38, stride=9973), every_float(1e-3, 99, stride=3001)])
    portable = core.simd_ops("scalar")
    for name in ("exp", "silu"):
        actual, expected = getattr(simd, name)(x), getattr(portable, name)(x)
        assert (actual.view(np.uint32) == expected.view(np.uint32)).all(), name
