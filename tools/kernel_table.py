"""What the compiler made of every CUDA kernel: registers, stack, shared memory, key instructions.

Reads resq_kernels/_C_cuda.so with cuobjdump (Python packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm, or the CUDA toolkit). tests/cuda/kernel_table.json is the committed table; a
test compares the two.

    python tools/kernel_table.py            print the table
    python tools/kernel_table.py --write    rewrite tests/cuda/kernel_table.json
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "resq_kernels/_C_cuda.so"
TABLE = ROOT / "tests/cuda/kernel_table.json"

# Instructions whose presence or absence says whether a kernel is what it is meant to be: tensor
# cores, 16-byte and asynchronous copies, programmatic dependent launch (ACQBULK is pdl_wait,
# PREEXIT is pdl_trigger), and local memory, which no kernel may touch. Loads before ACQBULK that
# the first-level cache may answer are counted as EARLY_LOAD, prefetches of spans into the second
# level as EARLY_PREFETCH.
KEY_INSTRUCTIONS = re.compile(
    r"^(IMMA\.\d+\.\w+\.\w+|IGMMA\.64x\d+x32\.\w+\.\w+|HMMA\.\d+\.\w+|UBLKCP|UBLKPF|UTMALDG\.\dD|LDSM|ACQBULK|PREEXIT"
    r"|LDGSTS\.E(?:\.\w+)*\.128|(?:LDG|STG|LDS|STS)\b.*\.128|LDL|STL|CALL)"
)
EARLY_LOAD, EARLY_PREFETCH = "LDG before ACQBULK", "UBLKPF before ACQBULK"
ACCESS = re.compile(r"^(LDG|STG|LDS|STS|LDGSTS)\b")

Kernel = dict[str, int | dict[str, int]]


def find_cuobjdump() -> str | None:
    """cuobjdump of the Python package or of the toolkit."""
    for folder in map(Path, sys.path):
        for found in sorted(folder.glob("nvidia/cu*/bin/cuobjdump")):
            return str(found)
    return shutil.which("cuobjdump")


def key_instruction(text: str) -> str | None:
    """The name that an instruction is counted under: "LDG.128", "IMMA.16864.S4.S4", ..."""
    found = KEY_INSTRUCTIONS.match(text)
    if not found:
        return None
    access = ACCESS.match(text)
    return f"{access[1]}.128" if access else found[1]


def kernels(library: Path = LIBRARY) -> dict[str, dict[str, Kernel]]:
    """kernel -> architecture -> registers, stack, shared, instructions, counts of key ones."""
    cuobjdump = find_cuobjdump()
    found: dict[str, dict[str, Kernel]] = {}
    arch = current = ""
    for line in _run(cuobjdump, "-res-usage", str(library)).splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            current = line.removeprefix(" Function ").rstrip(":")
        elif "REG:" in line and current:
            sizes = {name: int(size) for name, size in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault(current, {})[arch] = {
                "registers": sizes["REG"],
                "stack": sizes["STACK"],
                "local": sizes["LOCAL"],
                "shared": sizes["SHARED"],
            }
    for line in _run(cuobjdump, "-sass", str(library)).splitlines():
        line = line.strip()
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith("Function : "):
            current = line.removeprefix("Function : ")
            found[current][arch] |= {"instructions": 0, "key": Counter()}
            loads = prefetches = 0
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line):
            kernel = found[current][arch]
            kernel["instructions"] += 1
            loads += instruction[1].startswith("LDG.") and ".STRONG" not in instruction[1]
            if key := key_instruction(instruction[1]):
                kernel["key"][key] += 1
            prefetches += key == "UBLKPF"
            if key == "ACQBULK" and loads:
                kernel["key"][EARLY_LOAD] = loads
            if key == "ACQBULK" and prefetches:
                kernel["key"][EARLY_PREFETCH] = prefetches
    return {_readable(name): per_arch for name, per_arch in found.items()}


def _readable(mangled: str) -> str:
    """The demangled name and template arguments, without namespaces and parameters."""
    name = _run("c++filt", mangled).strip()
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name)
    name = re.sub(r"\((?:int|bool|[\w:]+)\)(?=-?\d)", "", name)  # template arguments: (int)32
    depth = 0
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:index]
    return name


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def committed() -> dict[str, dict[str, Kernel]]:
    """The table as rewritten by --write: what the test allows."""
    return json.loads(TABLE.read_text())


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    if find_cuobjdump() is None:
        sys.exit("kernel_table: expected cuobjdump (pip install nvidia-cuda-cuobjdump), found none")
    table = kernels(arguments.library)
    if arguments.write:
        rows = (
            f'  "{name}": {{\n'
            + ",\n".join(f'    "{arch}": {json.dumps(k)}' for arch, k in sorted(per_arch.items()))
            + "\n  }"
            for name, per_arch in sorted(table.items())
        )
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    for name, per_arch in sorted(table.items()):
        for arch, kernel in sorted(per_arch.items()):
            key = " ".join(f"{count}x{text}" for text, count in sorted(kernel["key"].items()))
            sizes = " ".join(f"{kernel[k]} {k}" for k in ("registers", "shared", "instructions"))
            print(f"{name:60} {arch:7} {sizes:50} {key}")


if __name__ == "__main__":
    main()
