"""Loads the built libraries with other Pythons and other versions of torch.

The libraries use torch's stable ABI alone and no Python symbol, so one build must serve all of
them. Each interpreter gets a copy of the package as it is, imports it, compares an operator with
the reference, and says whether the CUDA kernels are registered (they are where its torch has CUDA;
no GPU is needed).

    python tools/load_check.py /path/to/python [...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import sys, torch, resq_kernels
from resq_kernels import _library, ops, reference
x = torch.randn(3, 64)
for got, want in zip(ops.mixed_quantize(x, 8), reference.mixed_quantize(x, 8)):
    assert torch.equal(got, want)
compiled = torch.compile(lambda x: ops.mixed_quantize(x, 8).params, fullgraph=True, backend="eager")
assert torch.equal(compiled(x), ops.mixed_quantize(x, 8).params)
kernels = [op for op in ops.__all__
           if torch._C._dispatch_has_kernel_for_dispatch_key(f"resq::{op}", "CUDA")]
cuda = _library.CUDA_MISSING or f"CUDA kernels of {', '.join(kernels)}"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: loads, agrees; {cuda}")
"""


def main(interpreters: list[str]) -> int:
    """Returns the number of interpreters with which the package does not load."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "resq_kernels", Path(folder) / "resq_kernels")
        for python in interpreters:
            result = subprocess.run([python, "-c", PROBE], cwd=folder)
            failed += result.returncode != 0
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
