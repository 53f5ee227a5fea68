"""Inputs of mixed_gemm and its exact results, shared by the tests of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from emulation import Emulated

from resq_kernels import reference
from resq_kernels.formats import pack_int4, weight_sums

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def forced(device: Emulated, op: str, choice: str) -> Iterator[None]:
    """In this thread `op` runs this choice."""
    before = device.force_kernel(op, choice)
    try:
        yield
    finally:
        assert device.force_kernel(op, before) == choice


class Case(NamedTuple):
    """Arguments of reference.mixed_gemm; `run` packs the weight on the device and calls the op."""

    q_lo: torch.Tensor
    q_hi: torch.Tensor
    params: torch.Tensor
    codes_lo: torch.Tensor
    codes_hi: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype

    def arguments(self, device: Emulated) -> tuple:
        packed = device.pack_weight(self.codes_lo, self.codes_hi)
        sums = weight_sums(self.codes_lo, self.codes_hi)
        return (*self[:3], packed, self.weight_scale, sums, self.bias, self.out_dtype)

    def run(self, device: Emulated) -> torch.Tensor:
        return device.mixed_gemm(*self.arguments(device))

    def expected(self) -> torch.Tensor:
        return reference.mixed_gemm(*self)

    def rows(self, begin: int, end: int) -> Case:
        return Case(*(tensor[begin:end].clone() for tensor in self[:3]), *self[3:])


def make_case(
    rows: int,
    weight: tuple[int, int, int],
    packed: bool = True,
    bias: torch.dtype | None = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    extreme: bool = False,
) -> Case:
    """Random codes, or with `extreme` the most negative ones: the largest sums there are.

    Unpacked codes have 8 bits.
    """

    def codes(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, low + 1 if extreme else high, shape, dtype=torch.int8)

    n, k_lo, k_hi = weight
    q_lo = codes(-8, 8, rows, k_lo) if packed else codes(-128, 128, rows, k_lo)
    params = torch.rand(rows, 4)
    params[:, 1::2] = torch.randint(-255, 256, (rows, 2)).float()
    return Case(
        pack_int4(q_lo) if packed else q_lo,
        codes(-128, 128, rows, k_hi),
        params,
        pack_int4(codes(-8, 8, n, k_lo)),
        codes(-128, 128, n, k_hi),
        torch.rand(n, 2),
        None if bias is None else torch.randn(n).to(bias),
        out_dtype,
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    """Integers that are equal where the floats have the same bits; every NaN is the same."""
    integers = x.view({4: torch.int32, 2: torch.int16}[x.element_size()])
    return torch.where(x.isnan(), 0x7FFF, integers)


def assert_exact(case: Case, device: Emulated) -> torch.Tensor:
    """The kernel's result has the bits of the reference."""
    actual, expected = case.run(device), case.expected()
    assert actual.dtype == expected.dtype
    wrong = (bits(actual) != bits(expected)).nonzero()
    assert wrong.numel() == 0, f"{len(wrong)} of {actual.numel()} differ, first at {wrong[0]}"
    return actual
