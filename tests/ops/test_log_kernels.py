"""RESQ_LOG_KERNELS names every kernel that runs, once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from resq_kernels import ops
from resq_kernels.nn.linear import ResQLinear
layer = ResQLinear.from_linear(torch.nn.Linear(64, 32), 8)
for rows in (1, 2, 40):
    layer(torch.randn(rows, 64))
ops.hadamard(torch.randn(2, 64))
try:
    ops.hadamard(torch.randn(2, 64).long())
except RuntimeError:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("value", "logged"), [("1", True), ("0", False), ("", False)])
def test_kernels_are_named_once(value: str, logged: bool) -> None:
    isa = "avx2" if torch.ops.resq.cpu_isa() != "scalar" else "scalar"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "RESQ_LOG_KERNELS": value, "RESQ_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("resq_kernels:")]
    expected = [
        f"resq_kernels: search_scale: cpu {isa}",
        "resq_kernels: pack_weight: cpu scalar",
        f"resq_kernels: mixed_gemm: cpu {isa}",  # sums the rows of the weight
        f"resq_kernels: mixed_quantize: cpu {isa}",
        f"resq_kernels: hadamard: cpu {isa}",
    ]
    assert lines == (expected if logged else [])
    assert run.stdout == ""
