"""Runs nvcc, and fails on what makes a kernel right but slow.

Usage: python tools/compile_cuda.py OBJECT nvcc ARGUMENTS...   (ARGUMENTS with -Xptxas -v)

A build fails when ptxas says C75xx (it serialized wgmma) or when a kernel spills registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def problems(report: str) -> list[str]:
    """Why the build must not go on, one sentence each, from ptxas's -v report."""
    found = []
    kernel = ""
    for line in report.splitlines():
        if re.search(r"\bC75\d\d\b", line):
            found.append(line.strip())
        elif entry := ENTRY.search(line):
            kernel = f"{entry[1]} for {entry[2]}"
        elif (spills := SPILLS.search(line)) and (bytes := int(spills[1]) + int(spills[2])):
            found.append(f"{kernel}: expected no spilled registers, got {bytes} bytes")
    return found


def main(target: str, command: list[str]) -> int:
    """Compiles; returns the exit code."""
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    if result.returncode:
        print(report, file=sys.stderr)
        return result.returncode
    for line in report.splitlines():
        if re.search(r"warning|error", line) and "C75" not in line:
            print(line)
    if found := problems(report):
        Path(target).unlink(missing_ok=True)
        print("\n".join(f"compile_cuda: {line}" for line in found), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
