"""The sm_80 kernel of mixed_gemm has the bits of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulation import Emulated
from gemm_cases import DTYPES, assert_exact, bits, forced, make_case

# (N, K_lo, K_hi): odd N, one weight block and several; K that ends inside a step, a K tile and a
# chunk; rows whose bytes are no multiple of 16 (copied first); more K tiles than stages; parts
# without columns.
WEIGHTS = [
    (64, 512, 256),
    (130, 784, 112),
    (33, 6, 3),
    (1, 66, 33),
    (17, 0, 48),
    (200, 96, 0),
    (24, 2304, 320),
]
FORMS = pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])


@pytest.fixture(params=[128, 64], ids=["128 rows", "64 rows"])
def a100(sm80: Emulated, request: pytest.FixtureRequest) -> Iterator[Emulated]:
    """A device whose products run with this tile."""
    with forced(sm80, "mixed_gemm", f"sm80 {request.param}x128 splits=1"):
        yield sm80


@FORMS
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_sm80_has_the_bits_of_the_reference(
    a100: Emulated, weight: tuple[int, int, int], packed: bool
) -> None:
    for index, rows in enumerate([65, 130]):
        dtype = DTYPES[(index + weight[0]) % 3]
        assert_exact(make_case(rows, weight, packed, dtype, dtype), a100)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_sm80_takes_every_dtype(
    a100: Emulated, bias: torch.dtype | None, out_dtype: torch.dtype
) -> None:
    for n in (64, 41):  # 16-byte stores and single ones
        assert_exact(make_case(70, (n, 128, 64), bias=bias, out_dtype=out_dtype), a100)


@FORMS
@pytest.mark.parametrize("weight", [(64, 4096, 512), (130, 1984, 1024), (8, 0, 2048)], ids=str)
def test_sm80_splits_are_exact(sm80: Emulated, weight: tuple[int, int, int], packed: bool) -> None:
    case = make_case(65, weight, packed, bias=torch.bfloat16, out_dtype=torch.float16)
    for choice in ("sm80 64x128 splits=2", "sm80 64x128 splits=7", "sm80 128x128 splits=3"):
        with forced(sm80, "mixed_gemm", choice):
            assert_exact(case, sm80)


def test_sm80_visits_every_tile_of_a_large_grid(sm80: Emulated) -> None:
    # More row tiles than a raster group has, and a last group that is not full.
    case = make_case(128 * 10 + 3, (300, 64, 0), out_dtype=torch.bfloat16)
    with forced(sm80, "mixed_gemm", "sm80 128x128 splits=1"):
        assert_exact(case, sm80)


def test_sm80_row_does_not_depend_on_the_batch(a100: Emulated) -> None:
    case = make_case(130, (70, 784, 112))
    whole = assert_exact(case, a100)
    for begin, end in [(0, 1), (57, 77), (3, 67), (40, 110), (65, 130)]:
        part = case.rows(begin, end)
        assert torch.equal(part.run(a100), whole[begin:end])
        with forced(a100, "mixed_gemm", "small_m 64x64 splits=1"):
            assert torch.equal(part.run(a100), whole[begin:end])


@FORMS
def test_sm80_holds_the_largest_sums(a100: Emulated, packed: bool) -> None:
    assert_exact(make_case(65, (16, 4096, 512), packed, extreme=True), a100)


def test_sm80_returns_nan_for_rows_of_nan_scales(a100: Emulated) -> None:
    case = make_case(70, (40, 128, 32), out_dtype=torch.bfloat16)
    case.params[4, 0] = torch.nan
    case.params[66, 2] = torch.inf
    out = assert_exact(case, a100)
    assert out[4].isnan().all() and not out[3].isnan().any()


def test_sm80_without_any_columns_is_the_bias(a100: Emulated) -> None:
    assert_exact(make_case(65, (17, 0, 0)), a100)
    assert_exact(make_case(65, (17, 0, 0), bias=None), a100)


@FORMS
def test_sm80_shows_every_wrong_code(a100: Emulated, packed: bool) -> None:
    case = make_case(66, (20, 200, 40), packed, bias=None)
    right = assert_exact(case, a100)
    changes = [("q_lo", (2, 77), 16), ("q_hi", (65, 39), 1), ("codes_lo", (19, 99), 16)]
    for name, at, change in changes:
        wrong = case._replace(**{name: getattr(case, name).clone()})
        getattr(wrong, name)[at] ^= change
        row = slice(None) if name.startswith("codes") else at[0]
        column = at[0] if name.startswith("codes") else slice(None)
        differs = bits(wrong.run(a100)) != bits(right)
        assert differs[row, column].any(), name
        differs[row, column] = False
        assert not differs.any(), name
