"""The small-M kernel of mixed_gemm has the bits of the reference, on every family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import Emulated
from gemm_cases import DTYPES, assert_exact, bits, forced, make_case

# (N, K_lo, K_hi): odd N; K that ends inside a step, inside eight codes, at a whole stage; more
# stages than are in flight; parts without columns.
WEIGHTS = [
    (64, 512, 256),
    (70, 784, 112),
    (33, 6, 3),
    (1, 66, 33),
    (17, 0, 40),
    (130, 96, 0),
    (24, 2304, 320),
]


def small_m(rows: int, splits: int = 1) -> str:
    """The choice with the smallest tile that holds the rows."""
    tile = next(m for m in (8, 16, 32, 64) if m >= rows)
    return f"small_m {tile}x64 splits={splits}"


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_small_m_has_the_bits_of_the_reference(
    device: Emulated, weight: tuple[int, int, int], packed: bool
) -> None:
    for index, rows in enumerate([1, 3, 8, 16, 17, 33, 64]):
        dtype = DTYPES[index % 3]
        with forced(device, "mixed_gemm", small_m(rows)):
            assert_exact(make_case(rows, weight, packed, dtype, dtype), device)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_small_m_takes_every_dtype(
    sm80: Emulated, bias: torch.dtype | None, out_dtype: torch.dtype
) -> None:
    for n in (64, 41):  # 16-byte stores and single ones
        assert_exact(make_case(5, (n, 128, 32), bias=bias, out_dtype=out_dtype), sm80)


@pytest.mark.parametrize(
    "weight", [(64, 2048, 512), (70, 3152, 224), (8, 0, 2048), (9, 4100, 0)], ids=str
)
@pytest.mark.parametrize("arch", [80, 90])
def test_small_m_splits_are_exact(sm80: Emulated, arch: int, weight: tuple[int, int, int]) -> None:
    device = Emulated(arch, sms=64)
    chosen = device.mixed_gemm_kernel(1, *weight, True, device.index)
    assert chosen.startswith("small_m 8x64 splits=") and not chosen.endswith("=1")
    for rows, splits in ((1, 2), (9, 3), (40, 5)):
        with forced(device, "mixed_gemm", small_m(rows, splits)):
            assert_exact(make_case(rows, weight, True, torch.bfloat16, torch.float16), device)


def test_small_m_takes_any_rows_on_other_architectures(sm90: Emulated) -> None:
    # The library reads RESQ_CUDA_ARCH once, so another process plays the newer GPU.
    script = """
import sys
import torch
from emulation import Emulated, emulator
from gemm_cases import assert_exact, make_case

emulator().runtime()
torch.ops.load_library(sys.argv[1])
gpu = Emulated(90)
for packed in (True, False):
    for rows in (1, 65, 130):
        kernel = gpu.mixed_gemm_kernel(rows, 70, 784, 112, packed, gpu.index)
        assert kernel.startswith("small_m"), kernel
        assert_exact(make_case(rows, (70, 784, 112), packed, bias=None), gpu)
assert gpu.cuda_family(gpu.index) == "portable"
"""
    library = next(path for path in torch.ops.loaded_libraries if "resq_emulated" in path)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"RESQ_CUDA_ARCH": "portable", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script, library], env=environment, check=True)


def test_small_m_row_does_not_depend_on_the_batch(device: Emulated) -> None:
    case = make_case(64, (70, 784, 112))
    whole = assert_exact(case, device)
    for begin, end in [(0, 1), (57, 58), (3, 12), (20, 40), (31, 64)]:
        assert torch.equal(case.rows(begin, end).run(device), whole[begin:end])


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
def test_small_m_holds_the_largest_sums(device: Emulated, packed: bool) -> None:
    # 256 or 16 times a sum of K products of the most negative codes; 2^30 at K = 65536.
    case = make_case(2, (16, 4096, 512), packed, extreme=True)
    assert_exact(case, device)


def test_small_m_returns_nan_for_rows_of_nan_scales(device: Emulated) -> None:
    case = make_case(9, (40, 128, 32), out_dtype=torch.bfloat16)
    case.params[4, 0] = torch.nan
    case.params[7, 2] = torch.inf
    out = assert_exact(case, device)
    assert out[4].isnan().all() and not out[3].isnan().any()


def test_small_m_without_any_columns_is_the_bias(sm80: Emulated) -> None:
    assert_exact(make_case(3, (17, 0, 0)), sm80)
    assert_exact(make_case(3, (17, 0, 0), bias=None), sm80)


@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
def test_small_m_shows_every_wrong_code(device: Emulated, packed: bool) -> None:
    case = make_case(4, (20, 200, 40), packed, bias=None)
    right = assert_exact(case, device)
    changes = [("q_lo", (2, 77), 16), ("q_hi", (1, 39), 1), ("codes_lo", (19, 99), 16)]
    for name, at, change in changes:
        wrong = case._replace(**{name: getattr(case, name).clone()})
        getattr(wrong, name)[at] ^= change
        row = slice(None) if name.startswith("codes") else at[0]
        column = at[0] if name.startswith("codes") else slice(None)
        differs = bits(wrong.run(device)) != bits(right)
        assert differs[row, column].any(), name
        differs[row, column] = False
        assert not differs.any(), name
