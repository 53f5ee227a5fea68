"""decoder_layers on CUDA, under the emulator: the bits of its operators, and its launches."""

from __future__ import annotations

import emulation
import pytest
import torch
from decoder_cases import VARIANTS, Case


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bits_of_the_operators_one_by_one(dtype: torch.dtype, device: emulation.Emulated) -> None:
    Case([5, 0, 70], [1, 9, 2], dtype, device).check()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_reaches_its_operator(name: str, device: emulation.Emulated) -> None:
    Case([40, 3], [1, 1], torch.bfloat16, device, **VARIANTS[name]).check()


def test_layers_that_share_pages(device: emulation.Emulated) -> None:
    """Nothing of one layer may still read where the next one writes."""
    Case([0, 0], [40, 3], torch.bfloat16, device).check_shared_pages()


def test_no_token_launches_nothing(device: emulation.Emulated) -> None:
    case = Case([], [], torch.float16, device)
    emulation.events()
    out, residual = device.decoder_layers(**case.arguments())
    assert out.shape == residual.shape == (0, case.hidden)
    assert not emulation.events("cudaLaunchKernel")


def test_launches_of_a_layer(sm90: emulation.Emulated) -> None:
    """Ten, one fewer than by layers of transformers: both residual sums are the norms'."""
    counts = []
    for layers in (1, 2):
        case = Case([40, 3], [1, 1], torch.bfloat16, sm90, layers=layers)
        emulation.events()
        sm90.decoder_layers(**case.arguments())
        counts.append(len(emulation.events("cudaLaunchKernel")))
    assert counts[1] - counts[0] == 10
