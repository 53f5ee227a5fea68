"""Runs nvcc, keeps ptxas's resource report beside the object, fails on what makes a kernel slow.

Usage: python tools/compile_cuda.py OBJECT nvcc ARGUMENTS...   (ARGUMENTS with -Xptxas -v)

A build fails when ptxas says C75xx (it serialized wgmma: a kernel that is right and several times
too slow) or when a kernel spills registers. OBJECT.resources.json holds, for every kernel and
architecture: registers, spilled bytes, stack and static shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def resources(report: str) -> list[dict[str, object]]:
    """One entry per kernel and architecture of ptxas's -v report."""
    kernels: list[dict[str, object]] = []
    for line in report.splitlines():
        if found := ENTRY.search(line):
            kernels.append({"kernel": found[1], "arch": found[2]})
        elif kernels and "registers" not in kernels[-1]:
            if found := STACK.search(line):
                stack, stores, loads = (int(number) for number in found.groups())
                kernels[-1] |= {"stack": stack, "spills": stores + loads}
            elif found := USED.search(line):
                shared = SHARED.search(line)
                kernels[-1] |= {"registers": int(found[1])}
                kernels[-1] |= {"shared": int(shared[1]) if shared else 0}
    return kernels


def problems(report: str, kernels: list[dict[str, object]]) -> list[str]:
    """Why the build must not go on, one sentence each."""
    found = [line.strip() for line in report.splitlines() if re.search(r"\bC75\d\d\b", line)]
    for kernel in kernels:
        if kernel.get("spills"):
            found.append(
                f"{kernel['kernel']} for {kernel['arch']}: expected no spilled registers, "
                f"got {kernel['spills']} bytes"
            )
    return found


def main(target: str, command: list[str]) -> int:
    """Compiles; returns the exit code."""
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    if result.returncode:
        print(report, file=sys.stderr)
        return result.returncode
    kernels = resources(report)
    for line in report.splitlines():
        if re.search(r"warning|error", line) and "C75" not in line:
            print(line)
    if found := problems(report, kernels):
        Path(target).unlink(missing_ok=True)
        print("\n".join(f"compile_cuda: {line}" for line in found), file=sys.stderr)
        return 1
    Path(f"{target}.resources.json").write_text(json.dumps(kernels, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
