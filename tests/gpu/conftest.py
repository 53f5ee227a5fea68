"""Tests that need a CUDA device: skipped, with the reason, where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from resq_kernels import _library

sys.path.insert(0, str(Path(__file__).parent))


def unsupported_reason() -> str:
    """Why these tests cannot run here, or ""."""
    if _library.CUDA_MISSING:
        return _library.CUDA_MISSING
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture(autouse=True)
def cuda() -> None:
    """Skips the test without a device; otherwise fixes the seed of its inputs."""
    if reason := unsupported_reason():
        pytest.skip(reason)
    torch.manual_seed(0)
