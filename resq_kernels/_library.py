"""Loads the compiled libraries that register torch.ops.resq.*"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

_CPU_LIBRARY = Path(__file__).with_name("_C_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")
MINIMUM_TORCH = (2, 11)


def load() -> None:
    """Registers torch.ops.resq.* on the CPU; safe to call again.

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
    _load(_CPU_LIBRARY)


def load_cuda() -> str:
    """Registers the CUDA kernels where they can run; safe to call again, and needs no GPU.

    Returns:
        "" if they are registered, else the sentence that says why not.

    Raises:
        ImportError: torch and the library both have CUDA, and the library does not load.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not CUDA_LIBRARY.exists():
        why = (
            f"{CUDA_LIBRARY.name} is not built: install the CUDA toolkit (nvcc) and run "
            "`RESQ_CUDA=1 pip install --no-build-isolation -e .` in the source folder"
        )
        refuse_cuda(why)
        return why
    _load(CUDA_LIBRARY)
    return ""


@cache
def refuse_cuda(why: str) -> torch.library.Library:
    """Makes every operator raise "op: device: ..." with `why` when it is given CUDA tensors.

    Without this, torch's own error lists dispatch keys instead of the reason.

    Returns:
        The registrations, kept alive by the cache until their `_destroy`.
    """
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    library = torch.library.Library("resq", "IMPL", "CUDA")
    for name in sorted(name for name in registered if name.startswith("resq::")):
        library.impl(name, _refusal(name.removeprefix("resq::"), why))
    return library


def _refusal(op: str, why: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"{op}: device: expected tensors on the CPU, got cuda: {why}")

    return refuse


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError:
        # torch hides the loader's message; ctypes gives it.
        try:
            ctypes.CDLL(str(library))
        except OSError as cause:
            raise ImportError(f"resq_kernels: {library.name} does not load: {cause}") from cause
        raise


load()
CUDA_MISSING = load_cuda()
