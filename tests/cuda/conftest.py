"""Fixtures: the CUDA operators under the emulator, as a device of each family."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "ops"))  # mixed_check, ...

import emulation  # noqa: E402


@functools.cache
def library() -> None:
    """Builds and loads torch.ops.resq_emulated once a session."""
    if emulation.emulator() is None:
        pytest.skip("CUDA_EMU is not set: no emulator to run CUDA kernels with")
    if emulation.load_setup().find_nvcc() is None:
        pytest.skip("no nvcc: CUDA kernels cannot be compiled")
    path = emulation.build()
    emulation.emulator().runtime()
    torch.ops.load_library(str(path))


@pytest.fixture
def sm80() -> emulation.Emulated:
    """The operators as on an A100."""
    library()
    return emulation.Emulated(80)


@pytest.fixture
def sm90() -> emulation.Emulated:
    """The operators as on an H100."""
    library()
    return emulation.Emulated(90)


@pytest.fixture(params=[80, 90])
def device(request: pytest.FixtureRequest) -> emulation.Emulated:
    """The operators on each family."""
    library()
    return emulation.Emulated(request.param)
