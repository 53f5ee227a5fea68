"""The same program under every instruction set of the CPU operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ISAS = ["scalar", "avx2", "avx512vnni", "amx"]


def words_under(isa: str, program: str) -> list[str]:
    """What the file `program` prints in a process that is forced to `isa`.

    Skips the test where this process runs a lesser set: the machine may not have that one.
    """
    if ISAS.index(isa) > ISAS.index(torch.ops.resq.cpu_isa()):
        pytest.skip(f"this process runs {torch.ops.resq.cpu_isa()}, {isa} may not exist here")
    result = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "RESQ_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()
