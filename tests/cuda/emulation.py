"""The CUDA operators on the CPU: builds csrc's CUDA library for an emulator and calls it.

The emulator is a package `cuda_emu` in the folder that the environment variable CUDA_EMU names. It
compiles the same .cu and *_cuda.cpp files; their operators appear as torch.ops.resq_emulated.* on
CPU tensors. Every access is checked for bounds, races, missing waits and uninitialised memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
NAMESPACE = "resq_emulated"
# What tests/cuda/emulated/runtime.cpp stands in for.
WRAPPED = (
    "cudaFuncSetAttribute",
    "cudaFuncGetAttributes",
    "cudaOccupancyMaxActiveClusters",
    "cudaLaunchKernelExC",
    "cudaSetDevice",
    "cudaDeviceGetAttribute",
    "cudaGetDriverEntryPointByVersion",
)
# Devices that no test has used; below are those of the architectures.
NEW_DEVICES = itertools.count(1 << 20)


def load_file(path: str) -> ModuleType:
    """A Python file of the project that is in no package."""
    spec = importlib.util.spec_from_file_location(f"resq_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_setup() -> ModuleType:
    """setup.py's functions: the lists of sources and the place of CUTLASS."""
    arguments, sys.argv = sys.argv, ["setup.py", "--name"]
    try:
        with contextlib.redirect_stdout(None):
            return load_file("setup.py")
    finally:
        sys.argv = arguments


def emulator() -> ModuleType | None:
    """The package cuda_emu, or None where CUDA_EMU is not set."""
    folder = os.environ.get("CUDA_EMU")
    if not folder:
        return None
    os.environ.setdefault("CUDA_EMU_CACHE", str(ROOT / "build/cuda_emu"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import cuda_emu

    return cuda_emu


def build() -> Path:
    """Compiles the library; unchanged files come from the emulator's cache.

    One process at a time: the others wait, and find everything in the cache.
    """
    cuda_emu = emulator()
    lock = ROOT / "build/cuda_emu.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _build(cuda_emu)


def _build(cuda_emu: ModuleType) -> Path:
    project = load_setup()
    torch_root = Path(torch.__file__).parent
    common = ["-std=c++20", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off"]
    options = {
        "arch": "sm_90a",  # one library for both families; PTX of sm_80's instructions is the same
        "include_dirs": [
            ROOT / "tests/cuda/emulated",  # stands in for some headers of csrc/torch
            ROOT / "csrc",
            project.cutlass_include(),
            torch_root / "include",
        ],
        "defines": [
            f"RESQ_NAMESPACE={NAMESPACE}",
            "NDEBUG",
            f"TORCH_TARGET_VERSION={project.TORCH_TARGET}",
        ],
        "nvcc_flags": ["-std=c++20", "-O3", "--expt-relaxed-constexpr"],
        "cxx_flags": ["-O1", *common],
        "link_flags": [
            f"-L{torch_root}/lib",
            "-Wl,--no-as-needed",
            "-ltorch",
            *(f"-Wl,--wrap={name}" for name in WRAPPED),
        ],
    }
    names = ["csrc/schema.cpp", *project.sources(cuda=True), "tests/cuda/emulated/runtime.cpp"]
    sources = [ROOT / name for name in names]
    folder = ROOT / "build/cuda_emu"
    cuda_emu.runtime_library()

    def compile_alone(source: Path) -> None:
        cuda_emu.build([source], folder / f"parts/{source.name}.so", **options)

    # The emulator compiles one file after the other; its cache lets several callers share the work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_alone, sources))
    return cuda_emu.build(sources, folder / "resq_emulated.so", **options)


class Emulated:
    """torch.ops.resq_emulated on a device of compute capability `arch` / 10.

    The library keeps what it has learnt of a device, by its index: `new` is one it has never seen.
    """

    def __init__(self, arch: int, new: bool = False, **options: Any) -> None:
        self.arch, self.options = arch, {"check": "all", **options}
        self._index = next(NEW_DEVICES) if new else None

    @property
    def index(self) -> int:
        """The device's index, the same for devices with the same properties."""
        alike = 1000 * self.arch + self.options.get("sms", 0)
        return alike if self._index is None else self._index

    def __getattr__(self, op: str) -> Any:
        return lambda *args, **kwargs: self.call(op, *args, **kwargs)

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Runs an operator; raises KernelError with the report of a kernel that failed."""
        with self.current(*args, *kwargs.values()):
            result = getattr(getattr(torch.ops, NAMESPACE), op)(*args, **kwargs)
            emulator().check()
        return result

    @contextlib.contextmanager
    def current(self, *args: Any) -> Iterator[None]:
        """Lets operators run on this device and touch these tensors."""
        flat = [item for a in args for item in (a if isinstance(a, list) else [a])]
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        runtime().emulated_set_device(self.index)
        with registered(tensors), emulator().options(arch=self.arch, **self.options):
            yield


def runtime() -> ctypes.CDLL:
    """The functions of tests/cuda/emulated/runtime.cpp."""
    path = next(path for path in torch.ops.loaded_libraries if "resq_emulated" in path)
    library = ctypes.CDLL(path)
    library.emulated_events.restype = ctypes.c_char_p
    return library


def events(call: str = "") -> list[str]:
    """The calls of the CUDA runtime since the last call of this whose line begins with `call`."""
    lines = runtime().emulated_events().decode().splitlines()
    return [line for line in lines if line.startswith(call)]


@contextlib.contextmanager
def stopped_by_trap() -> Iterator[None]:
    """Expects a kernel to stop itself inside the block, and takes its error off the emulator.

    As on a GPU, where the kernel runs later, its launch succeeds.
    """
    with pytest.raises(emulator().KernelError, match="trap executed"):
        yield


@contextlib.contextmanager
def registered(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Lets kernels touch exactly the storage of these tensors and what they allocate."""
    runtime = emulator().runtime()
    ranges = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    ranges = {pointer: size for pointer, size in ranges.items() if size}
    for pointer, size in ranges.items():
        runtime.cuda_emu_register_range(ctypes.c_void_p(pointer), size, b"tensor")
    try:
        yield
    finally:
        for pointer in ranges:
            runtime.cuda_emu_unregister_range(ctypes.c_void_p(pointer))
