"""gptq_block on CUDA under the emulator: the bits of the CPU's operator."""

from __future__ import annotations

import pytest
import torch
from emulation import Emulated
from gptq_cases import arguments

from resq_kernels import ops


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns, rows", [(1, 1), (5, 127), (31, 128), (32, 300)], ids=str)
def test_gptq_block_has_the_bits_of_the_cpu(
    device: Emulated, columns: int, rows: int, bits: int
) -> None:
    given = arguments(columns, rows)
    given[0][0, 0] = 1e30
    got = device.gptq_block(*given, bits)
    assert all(map(torch.equal, got, ops.gptq_block(*given, bits)))


def test_nan_has_the_code_of_the_cpu(device: Emulated) -> None:
    given = arguments(4, 6)
    given[0][1, 3] = torch.nan
    got, expected = device.gptq_block(*given, 4), ops.gptq_block(*given, 4)
    assert got[0][1, 3] == -8 and torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1]) and got[2][1, 3].isnan()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_nothing_to_round(device: Emulated, shape: tuple[int, int]) -> None:
    assert all(part.shape == shape for part in device.gptq_block(*arguments(*shape), 4))
