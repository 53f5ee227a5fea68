"""Builds the shared libraries with ninja against torch's stable ABI.

One CPU library for every torch >= 2.11 and every Python >= 3.10: it exports no Python symbol and
is opened by torch.ops.load_library, so the wheel is tagged py3-none. torch's headers are found
without importing torch. Knobs: CXX, MAX_JOBS, RESQ_SANITIZE=address,undefined (test builds).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11, our floor
NO_TORCH = """resq_kernels: PyTorch >= 2.11 must be installed before this package is built:
  pip install torch            # or torch==2.13.0, or a CUDA build
  pip install --no-build-isolation ."""


def torch_root() -> Path:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(NO_TORCH)
    return Path(spec.origin).parent


def cpu_sources() -> list[str]:
    """Every .cpp of csrc except the CUDA registrations and the test-only module."""
    sources = (path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))
    return sorted(s for s in sources if not s.endswith("_cuda.cpp"))


def ninja_file(sources: list[str], output: Path, build: Path) -> str:
    """The text of build.ninja: one object per source, one shared library."""
    torch = torch_root()
    sanitize = os.environ.get("RESQ_SANITIZE", "")
    extra = f"-fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
    # -ffp-contract=off: the numerics contract rounds every product and sum on its own, so that all
    # instruction sets agree bit for bit. libtorch must be a NEEDED entry (--no-as-needed): CUDA
    # builds of torch open it RTLD_LOCAL, and its symbols are not found otherwise.
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "cxxflags = -O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra "
        f"-Werror=return-type -ffile-prefix-map={ROOT}/= -DTORCH_TARGET_VERSION={TORCH_TARGET} "
        f"-isystem {torch}/include -I{ROOT}/csrc {extra}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{torch}/lib -Wl,--no-as-needed -ltorch {extra}",
    ]
    objects = []
    for source in sources:
        objects.append(f"{build}/{source.replace('/', '_')}.o")
        lines.append(f"build {objects[-1]}: compile {ROOT / source}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """build_ext that writes build.ninja and runs ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        import ninja

        # Not build_temp: pip gives every editable install a new one, and ninja would start over.
        build = ROOT / "build" / ("ninja" + os.environ.get("RESQ_SANITIZE", ""))
        build.mkdir(parents=True, exist_ok=True)
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            (build / "build.ninja").write_text(ninja_file(extension.sources, output, build))
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *jobs])


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("resq_kernels._C_cpu", cpu_sources())],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
