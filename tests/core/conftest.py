"""Builds the test-only module `resq_core`: csrc/core and the SIMD operations for Python."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "tests_core"


def ninja_file(module: Path) -> str:
    """The text of build.ninja: the flags of setup.py without torch."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d -O1 -std=c++20 -fPIC -fvisibility=hidden "
        "-ffp-contract=off -Wall -Wextra -Werror "
        + "".join(f"-isystem {path} " for path in includes)
        + f"-I{CSRC} -I{HERE} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out",
    ]
    sources = [*sorted(HERE.glob("*.cpp")), CSRC / "cpu/isa.cpp", CSRC / "cuda/percent.cpp"]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [
        f"build {name}: compile {source}" for name, source in zip(objects, sources, strict=True)
    ]
    lines.append(f"build {module.name}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def core() -> ModuleType:
    """The module, compiled at its first use and when a source has changed."""
    import ninja

    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("Python.h is not installed (python3-dev): resq_core cannot be compiled")
    BUILD.mkdir(parents=True, exist_ok=True)
    module = BUILD / f"resq_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers one builds
        (BUILD / "build.ninja").write_text(ninja_file(module))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(BUILD)], check=True)
    spec = importlib.util.spec_from_file_location("resq_core", module)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["resq_core"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small tensors: on a busy machine torch's threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
