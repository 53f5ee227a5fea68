"""The build backend: setuptools', which asks for torch and CUTLASS only where none is (note 0032).

pip builds in an environment of its own and hides the user's packages from it. The libraries use
torch's stable ABI alone, so that any torch >= 2.11 serves: one that the user has is taken from
there. Without one, pip fetches it for the build. setup.py finds its tools with the same functions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import sys
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks are setuptools' own

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARCHS = "80;86;89;90a;ptx"


def package_root(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    # The second are the folders of sys.executable's environment, which pip takes out of sys.path.
    spec = importlib.util.find_spec(name) or PathFinder.find_spec(name, site.getsitepackages())
    return Path(spec.origin).parent if spec and spec.origin else None


def find_torch() -> Path | None:
    """The folder of a torch >= 2.11."""
    root = package_root("torch")
    found = list(distributions(name="torch", path=[str(root.parent)])) if root else []
    new = found and tuple(int(part) for part in found[0].version.split(".")[:2]) >= (2, 11)
    return root if new else None


def find_cutlass() -> Path | None:
    """CUTLASS's headers: $CUTLASS_PATH, or else the submodule or the package nvidia-cutlass."""
    package = package_root("cutlass_library")
    places = [ROOT / "third_party/cutlass", *([package / "source"] if package else [])]
    if "CUTLASS_PATH" in os.environ:
        places = [Path(os.environ["CUTLASS_PATH"])]
    includes = [place / "include" for place in places]
    return next((path for path in includes if (path / "cutlass/version.h").exists()), None)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or PATH; None if the CUDA library is not to be built."""
    wish = os.environ.get("RESQ_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"resq_kernels: RESQ_CUDA: expected auto, 0 or 1, got {wish}")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if wish == "1" and nvcc is None:
        sys.exit(f"resq_kernels: RESQ_CUDA=1: expected nvcc in {home or 'PATH'}, found none")
    return nvcc if wish != "0" and not os.environ.get("RESQ_SANITIZE") else None


def cuda_archs() -> list[str]:
    """What the CUDA library is compiled for, RESQ_CUDA_ARCHS: like "90a", and "ptx" for newer."""
    archs = [a for a in os.environ.get("RESQ_CUDA_ARCHS", DEFAULT_ARCHS).split(";") if a]
    unknown = [arch for arch in archs if not arch.rstrip("a").isdigit() and arch != "ptx"]
    if unknown:
        sys.exit(f"resq_kernels: RESQ_CUDA_ARCHS: expected like {DEFAULT_ARCHS}, got {unknown[0]}")
    return archs


def missing() -> list[str]:
    """What the build needs beside setuptools and ninja, and does not find."""
    torch = [] if find_torch() else ["torch>=2.11"]
    cutlass = ["nvidia-cutlass==4.2.0.0"] if find_nvcc() and not find_cutlass() else []
    return torch + cutlass


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing()]
