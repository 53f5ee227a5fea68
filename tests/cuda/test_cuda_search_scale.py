"""search_scale on CUDA under the emulator: the bits of the CPU's operator."""

from __future__ import annotations

import pytest
import torch
from emulation import Emulated

from resq_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, columns", [(1, 1), (9, 16), (17, 131), (3, 2048)], ids=str)
def test_search_scale_has_the_bits_of_the_cpu(
    device: Emulated, rows: int, columns: int, bits: int, dtype: torch.dtype
) -> None:
    """Gaussian rows, whose search is long, and heavy tails, which are clipped far."""
    weight = torch.randn(rows, columns)
    weight[::2] = torch.distributions.StudentT(1.5).sample((len(weight[::2]), columns))
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    got = device.search_scale(weight, bits)
    assert torch.equal(got, ops.search_scale(weight, bits))


def test_rows_without_a_search(device: Emulated) -> None:
    weight = torch.randn(5, 40)
    weight[0], weight[1, 39], weight[2, 0], weight[3] = 0, torch.nan, -torch.inf, 1e-40
    got, expected = device.search_scale(weight, 4), ops.search_scale(weight, 4)
    assert got[0] == 1 and got[1:3].isnan().all()
    assert torch.equal(got[3:], expected[3:])


def test_nothing_to_search(device: Emulated) -> None:
    assert torch.equal(device.search_scale(torch.empty(4, 0), 4), torch.zeros(4))
    assert device.search_scale(torch.empty(0, 8), 4).shape == (0,)
