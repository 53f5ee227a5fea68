"""CUTLASS's product that `resq bench gemm` times is right, and its check finds a wrong one."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import emulation
import pytest
import torch

from resq_kernels.bench.cutlass_s4s8 import CutlassS4S8, check
from resq_kernels.formats import pack_int4

MULTIPROCESSORS = 8
# M -> (N, K): each configuration (up to 64, up to 128, more tokens) with whole and partial tiles,
# K with and without a tail of its 128 columns, more stages than fit at once.
SIZES = {
    1: [(256, 384), (200, 160)],
    16: [(264, 512)],
    64: [(392, 416), (64, 4096)],
    65: [(128, 128)],
    128: [(264, 640), (128, 2048)],
    200: [(392, 416)],
    300: [(520, 1536)],
}


@functools.cache
def library() -> ctypes.CDLL:
    """The benchmark's library, built for the emulator once a session."""
    cuda_emu, project = emulation.emulator(), emulation.load_setup()
    if cuda_emu is None:
        pytest.skip("CUDA_EMU is not set: no emulator to run CUDA kernels with")
    if project.find_nvcc() is None:
        pytest.skip("no nvcc: CUDA kernels cannot be compiled")
    return cuda_emu.load(
        cuda_emu.build(
            [emulation.ROOT / project.BENCHMARKS[0]],
            emulation.ROOT / "build/cuda_emu/cutlass_s4s8.so",
            arch="sm_90a",
            include_dirs=[project.cutlass_include()],
            defines=["NDEBUG"],
            nvcc_flags=["-std=c++20", "-O3", "--expt-relaxed-constexpr"],
            cxx_flags=["-O1", "-std=c++20"],
        )
    )


class Case(NamedTuple):
    """Arguments of `check` after the result."""

    codes: torch.Tensor
    x: torch.Tensor
    weight_scale: torch.Tensor
    row_scale: torch.Tensor

    def run(self, weight: torch.Tensor) -> torch.Tensor:
        """The product with a packed weight, every access checked."""
        y = torch.full((len(self.x), len(weight)), torch.nan, dtype=torch.bfloat16)
        product, cuda_emu = CutlassS4S8(library()), emulation.emulator()
        with cuda_emu.options(arch=90, sms=MULTIPROCESSORS, check="all"):
            workspace = product.workspace(len(self.x), *self.codes.shape, y.device)
            tensors = [weight, *self[1:], y, workspace]
            with emulation.registered(tensors):
                product(*tensors)
                cuda_emu.check()
        return y


def make_case(m: int, n: int, k: int) -> Case:
    """Random codes of the whole range."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return Case(codes, x, torch.rand(n) + 0.5, torch.rand(m) + 0.5)


@pytest.mark.parametrize(
    "size", [(m, *size) for m, sizes in SIZES.items() for size in sizes], ids=str
)
def test_equals_the_integer_product(size: tuple[int, int, int]) -> None:
    case = make_case(*size)
    y = case.run(pack_int4(case.codes))
    sums = case.x.long() @ case.codes.long().T
    expected = (sums.float() * case.weight_scale * case.row_scale[:, None]).bfloat16()
    assert torch.equal(y, expected)
    check(y, *case)


@pytest.mark.parametrize("m", [16, 128, 200])
def test_blocks_that_share_the_columns_of_a_tile_add_up(m: int) -> None:
    product = CutlassS4S8(library())  # skips where there is no emulator
    with emulation.emulator().options(arch=90, sms=MULTIPROCESSORS):
        assert len(product.workspace(m, 128, 8192, torch.device("cpu"))) > 0
    case = make_case(m, 128, 8192)
    check(case.run(pack_int4(case.codes)), *case)


def test_extreme_codes_are_exact() -> None:
    case = make_case(130, 136, 4096)
    case.codes.fill_(-8), case.x.fill_(-128)
    case.codes[1] = 7
    check(case.run(pack_int4(case.codes)), *case)


@pytest.mark.parametrize("m", [16, 128, 200])
def test_the_check_finds_a_wrong_order_of_weights(m: int) -> None:
    case = make_case(m, 136, 256)
    packed = pack_int4(case.codes)
    for wrong in (packed << 4 | packed >> 4, packed.flip(1), packed.roll(1, 0)):
        with pytest.raises(RuntimeError, match=f"cutlass_s4s8: {m}x136x256: expected the integer"):
            check(case.run(wrong.contiguous()), *case)


@pytest.mark.parametrize("n, k", [(132, 256), (136, 272)])
def test_sizes_that_do_not_fit_are_refused(n: int, k: int) -> None:
    case = make_case(16, n, k)
    message = rf"expected N % 8 == 0 and K % 32 == 0, got {n} and {k}"
    with pytest.raises(ValueError, match=message):
        case.run(pack_int4(case.codes))


def test_what_cutlass_refuses_is_an_error() -> None:
    """The library has its own checks, in case the sizes above are not what it takes."""
    functions, null = library(), ctypes.c_void_p(0)
    functions.cutlass_s4s8_error.restype = ctypes.c_char_p
    code = functions.cutlass_s4s8_launch(null, null, null, null, null, 16, 132, 256, null, null)
    assert functions.cutlass_s4s8_error(code) == b"Invalid status"
