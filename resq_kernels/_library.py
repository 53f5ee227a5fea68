"""Loads the compiled library that registers torch.ops.resq.*"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_CPU_LIBRARY = Path(__file__).with_name("_C_cpu.so")
MINIMUM_TORCH = (2, 11)


def load() -> None:
    """Registers torch.ops.resq.*; safe to call again.

    Raises:
        ImportError: torch is older than 2.11, or the library is missing or does not load; the
            message says which and what to do.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(f"resq_kernels: expected torch >= 2.11, got {torch.__version__}")
    if not _CPU_LIBRARY.exists():
        raise ImportError(
            f"resq_kernels: {_CPU_LIBRARY.name} is not built; run "
            "`pip install --no-build-isolation -e .` in the source folder"
        )
    try:
        torch.ops.load_library(str(_CPU_LIBRARY))
    except OSError:
        # torch hides the loader's message; ctypes gives it.
        try:
            ctypes.CDLL(str(_CPU_LIBRARY))
        except OSError as cause:
            name = _CPU_LIBRARY.name
            raise ImportError(f"resq_kernels: {name} does not load: {cause}") from cause
        raise


load()
