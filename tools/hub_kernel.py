"""Lays the operators out as a kernel of the Hugging Face hub, as the package `kernels` loads them.

Usage: python tools/hub_kernel.py [--out FOLDER] [--backends cpu cuda]

The folder has a build for every backend, build/<variant>: the operators' Python files, the compiled
libraries and metadata.json. Several builds may be loaded in one process, and beside an installed
resq_kernels. So every build has an id of its own, by its contents: the namespace of its operators,
torch.ops.<id>, and the name of its module. Its files import each other relative to themselves.

Source: https://huggingface.co/docs/kernels/kernel-requirements; docs/notes/0060.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resq_kernels"
TEMPLATE = ROOT / "tools/hub"
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import cuda_archs, find_nvcc  # noqa: E402

NAME = "resq-kernels"
VERSION = 0  # of the interface; the hub's number for one that still changes
# The operators, and what makes and describes their arguments; nothing of models.
FILES = ("_library.py", "formats.py", "kv_pages.py", "weights.py", "ops/*.py")
# One build against the stable ABI of torch 2.11 serves all newer ones, and one of CUDA 13.0 all 13.
VARIANTS = {
    "cpu": "torch-stable-abi211-cpu-x86_64-linux",
    "cuda": "torch-stable-abi211-cu130-x86_64-linux",
}
CONTENTS = {"README.md", "LICENSE", "build"}
LIBRARIES = {"cpu": ("_C_cpu.so",), "cuda": ("_C_cpu.so", "_C_cuda.so")}
# Newer symbols than these are not on every machine that the hub's kernels are meant for.
OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def main(arguments: list[str]) -> None:
    """Builds every backend, then puts the finished folder in the place of an older one."""
    options = parse(arguments)
    if "cuda" in options.backends and not find_nvcc():
        sys.exit("hub_kernel: --backends: expected nvcc for cuda, found none")
    out: Path = options.out
    if out.exists() and not is_ours(out):
        sys.exit(f"hub_kernel: --out: expected a folder that this program wrote, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name) / NAME
        for backend in options.backends:
            print(f"compiling for {VARIANTS[backend]}", flush=True)
            write_variant(folder / "build" / VARIANTS[backend], backend, identifier(backend))
        for path in (TEMPLATE / "README.md", ROOT / "LICENSE"):
            shutil.copy(path, folder)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    for path in sorted(out.glob("build/*")):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"{path}: {size / 1e6:.1f} MB")
    if newer := ", ".join(newer_symbols(out)):
        print(f"for this machine: {newer} are newer than what the hub's kernels may need")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        "hub_kernel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "out/hub" / NAME
    parser.add_argument("--out", type=Path, default=default, help="default: out/hub/resq-kernels")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=sorted(VARIANTS),
        default=sorted(VARIANTS) if find_nvcc() else ["cpu"],
        help="default: cpu, and cuda where nvcc is found",
    )
    return parser.parse_args(arguments)


def is_ours(out: Path) -> bool:
    """Whether a folder holds nothing but what this program writes into it."""
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= CONTENTS:
        return False
    builds = list((out / "build").iterdir()) if (out / "build").is_dir() else []
    return all(path.name in VARIANTS.values() for path in builds)


def identifier(backend: str) -> str:
    """The id of a build, by all that it is made of."""
    made_of = [ROOT / "setup.py", Path(__file__), TEMPLATE / "__init__.py", *python_files()]
    made_of += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    digest = hashlib.sha256(";".join(cuda_archs()).encode())
    for path in sorted(made_of):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"_{NAME.replace('-', '_')}_{backend}_{digest.hexdigest()[:7]}"


def python_files() -> list[Path]:
    """The files of the package that go into a build."""
    return sorted(path for pattern in FILES for path in PACKAGE.glob(pattern))


def write_variant(folder: Path, backend: str, name: str) -> None:
    """Writes one build: files, libraries, and metadata.json with their hashes."""
    for path in python_files():
        target = folder / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(standalone(path, name))
    shutil.copy(TEMPLATE / "__init__.py", folder)
    compile_libraries(folder, backend, name)
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": hub_archs()} if backend == "cuda" else {}),
        "digest": {"algorithm": "sha256", "files": hashes(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def standalone(path: Path, name: str) -> str:
    """The text of a file of the package, which imports its neighbours and calls torch.ops.<name>.

    Raises:
        ValueError: it imports what does not go into a build.
    """
    up = "." * len(path.relative_to(PACKAGE).parts)
    text = path.read_text()
    text = re.sub(r"^( *from )resq_kernels\.", rf"\1{up}", text, flags=re.M)
    text = re.sub(r"^( *from )resq_kernels import ", rf"\1{up} import ", text, flags=re.M)
    text = text.replace("torch.ops.resq.", f"torch.ops.{name}.")
    text = text.replace('NAMESPACE = "resq"', f'NAMESPACE = "{name}"')
    there = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in python_files()}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                if module not in there:
                    raise ValueError(f"{path.name}: {module}: expected a module of {FILES}")
    return text


def compile_libraries(folder: Path, backend: str, name: str) -> None:
    """Builds the libraries of a backend, whose operators are torch.ops.<name>, into a folder."""
    with tempfile.TemporaryDirectory() as built:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", built]
        knobs = {"RESQ_NAMESPACE": name, "RESQ_CUDA": "1" if backend == "cuda" else "0"}
        environment = {**os.environ, **knobs, "RESQ_CUDA_BENCHMARKS": "0", "RESQ_SANITIZE": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        for library in LIBRARIES[backend]:
            shutil.copy(Path(built) / PACKAGE.name / library, folder)


def hub_archs() -> list[str]:
    """What the CUDA library is compiled for, in the hub's words: "9.0", "8.0+PTX"."""
    # Kernels that need sm_90a have portable siblings, and PTX is that of 8.0 (setup.py, gencode).
    numbers = [arch.rstrip("a") for arch in cuda_archs()]
    return sorted({"8.0+PTX" if n == "ptx" else f"{n[:-1]}.{n[-1]}" for n in numbers})


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a build in base 64, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def newer_symbols(out: Path) -> list[str]:
    """Versions of symbols that libraries ask for, and that are newer than `OLDEST`."""
    found = set()
    for library in out.rglob("*.so"):
        for name, version in re.findall(
            rb"\0(GLIBCXX|GLIBC|CXXABI)_([\d.]+)(?=\0)", library.read_bytes()
        ):
            numbers = tuple(map(int, version.split(b".")))
            if numbers > OLDEST[name.decode()]:
                found.add((name.decode(), numbers))
    return [f"{name}_{'.'.join(map(str, numbers))}" for name, numbers in sorted(found)]


if __name__ == "__main__":
    main(sys.argv[1:])
