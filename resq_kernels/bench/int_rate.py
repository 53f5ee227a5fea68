"""The rate of the integer instructions that the CPU kernels use (int_rate.cpp), measured."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


def integer_rate(threads: int) -> float | None:
    """Integer products per second of all threads together.

    None if the CPU runs the portable kernels, if there is no compiler to build the measurement, or
    if int_rate.cpp has none for this instruction set.
    """
    isa, compiler = torch.ops.resq.cpu_isa(), os.environ.get("CXX", "g++")
    if isa == "scalar" or shutil.which(compiler) is None:
        return None
    source = Path(__file__).with_name("int_rate.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "int_rate.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o"]
        subprocess.run([*command, str(library)], check=True)
        rate = getattr(ctypes.CDLL(str(library)), f"resq_rate_{isa}", None)
        if rate is None:
            return None
        rate.restype = ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:
            runs = [sum(pool.map(lambda _: rate(), range(threads))) for _ in range(5)]
        return max(runs)
