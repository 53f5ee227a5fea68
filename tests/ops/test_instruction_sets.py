"""Every instruction set gives the same bits, and no code of one leaks into another."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizer_digests import digest, digests

import resq_kernels

DIGESTS = Path(__file__).with_name("quantizer_digests.py")
LIBRARY = Path(resq_kernels.__file__).with_name("_C_cpu.so")


def run(isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(DIGESTS)],
        env={**os.environ, "RESQ_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    current = torch.ops.resq.cpu_isa()
    here = digests()
    compared = 0
    for isa in {"scalar", "avx2", "avx512vnni", "amx"} - {current}:
        process = run(isa)
        if "but this machine has" in process.stderr:
            continue
        assert process.returncode == 0, process.stderr
        result = json.loads(process.stdout)
        assert result["isa"] == isa
        different = [name for name, bits in here.items() if result["digests"][name] != bits]
        assert not different, f"{isa}: {len(different)} of {len(here)} differ: {different[:5]}"
        compared += 1
    assert compared or current == "scalar"


def test_digests_notice_one_bit() -> None:
    x = torch.randn(3, 5)
    y = x.clone()
    y.view(torch.int32)[1, 2] ^= 1
    assert digest((x,)) == digest((x.clone(),)) != digest((y,))


@pytest.mark.slow
def test_unknown_instruction_set_is_refused() -> None:
    process = run("sse9")
    assert process.returncode != 0
    assert "RESQ_CPU_ISA: expected scalar, avx2, avx512vnni or amx, got sse9" in process.stderr


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs binutils")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86-64")
def test_wide_registers_stay_in_their_namespace() -> None:
    """A function outside the namespaces avx2, avx512vnni and amx runs on machines without them.

    The linker keeps one copy of an inline function: if a file for AVX-512 compiled one that other
    files use too, a machine without AVX-512 would meet an illegal instruction.
    """
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    function, seen, leaks = "", set(), set()
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif register := re.search(r"%([yz])mm|%k[1-7]|\bv[a-z]+[0-9a-z]*\s.*%xmm", line):
            seen.add(register[1])
            wide = ("avx512vnni::", "amx::")
            if not any(
                name in function for name in (wide if register[1] == "z" else (*wide, "avx2::"))
            ):
                leaks.add(function)
        elif re.search(r"%tmm|\bldtilecfg|\btilerelease", line):
            seen.add("tile")
            if "amx::" not in function:
                leaks.add(function)
    assert {"y", "z", "tile"} <= seen
    assert not leaks
