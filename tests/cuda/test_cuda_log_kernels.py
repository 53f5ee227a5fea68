"""RESQ_LOG_KERNELS on CUDA: the family, and of mixed_gemm the kernel, its tile and splits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

HERE = Path(__file__).parent
PROGRAM = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent / "ops")!r}]
import conftest, emulation, torch
from test_cuda_opcheck import gemm_arguments
conftest.library()
for family in (80, 90):
    device = emulation.Emulated(family)
    device.hadamard(torch.randn(2, 64))
    device.mixed_gemm(*gemm_arguments(device))
"""


def test_kernels_are_named(sm90: emulation.Emulated) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "RESQ_LOG_KERNELS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for family in ("sm80", "sm90"):
        assert run.stderr.count(f"resq_kernels: hadamard: cuda {family}\n") == 1
        assert f"resq_kernels: mixed_gemm: cuda {family}, small_m " in run.stderr


def test_nothing_is_said_by_default(sm90: emulation.Emulated, capfd: pytest.CaptureFixture) -> None:
    sm90.hadamard(torch.randn(2, 64))
    assert "resq_kernels:" not in capfd.readouterr().err
