"""Builds the wheel, installs it in an empty environment and calls an operator there.

Usage: python tools/wheel_check.py "torch==2.13.0"
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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
print(f"wheel: resq_kernels {resq_kernels.__version__}, torch {torch.__version__}, "
      f"{torch.ops.resq.cpu_isa()}: mixed_quantize agrees with the reference")
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Runs a command and ends with its exit code when it fails."""
    result = subprocess.run([str(part) for part in command], cwd=cwd)
    if result.returncode:
        sys.exit(result.returncode)


def main(torch: str) -> None:
    """Builds, installs and probes the wheel; leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
        run(sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", "-w", work, ROOT,
            cwd=work)  # fmt: skip
        (wheel,) = work.glob("*.whl")
        if not wheel.name.endswith(".whl") or "-py3-none-" not in wheel.name:
            sys.exit(f"expected a py3-none wheel, got {wheel.name}")
        print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB")
        venv.create(work / "venv", with_pip=True)
        python = work / "venv/bin/python"
        run(python, *pip, "install", torch, cwd=work)
        run(python, *pip, "install", wheel, cwd=work)
        run(python, "-c", PROBE, cwd=work)
        run(work / "venv/bin/resq", "info", cwd=work)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
