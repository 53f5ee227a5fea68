"""The arrows of docs/design.md, and the limit on the length of a file."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resq_kernels"
MAX_LINES = 500

# layer -> what it may import of this package (first name below resq_kernels).
LEAVES = {"formats", "config", "hadamard", "head_norm", "kv_pages", "architecture"}
ALLOWED = {
    "_library": set(),
    "config": set(),
    "formats": {"config"},
    "hadamard": set(),
    "head_norm": set(),
    "architecture": {"config", "formats"},
    "kv_pages": {"formats"},
    "reference": LEAVES,
    "weights": LEAVES | {"ops"},
    "safetensors_io": set(),
    "checkpoint": LEAVES | {"safetensors_io"},
    "weight_reader": LEAVES | {"safetensors_io"},
    "chat_template": set(),
    "texts": set(),
    "evaluate": set(),
    "needle": set(),
    "html_page": set(),
    "intervals": set(),
    "ops": LEAVES | {"_library"},
    "nn": LEAVES | {"ops", "weights"},
    "fake_quant": LEAVES | {"nn", "reference"},
    "ptq": LEAVES
    | {"checkpoint", "safetensors_io", "weights", "reference", "ops", "_library", "html_page"}
    | {"evaluate", "intervals", "chat_template"},
    "integrations": LEAVES | {"nn", "ops", "checkpoint", "weight_reader"},
    "api": LEAVES | {"ptq", "checkpoint", "safetensors_io"},
    "testing": LEAVES
    | {"integrations", "checkpoint", "safetensors_io", "nn", "ops", "reference", "fake_quant"},
    "bench": LEAVES | {"testing", "nn", "ops", "reference"},
    "commands": LEAVES
    | {"ptq", "nn", "evaluate", "needle", "texts", "_library", "fake_quant", "bench", "checkpoint"}
    | {"safetensors_io", "intervals", "html_page", "chat_template"},
    "cli": {"commands", "__version__"},
    "__main__": {"cli"},
    "__init__": LEAVES | {"_library", "integrations", "ops", "nn", "api"},
}
# layer -> the only files of the package, outside of it, that import it.
USERS = {
    "bench": {"commands/bench.py"},
    "fake_quant": {"commands/evaluate.py", "testing/lockstep.py"},
    "testing": {"bench/model.py"},
}


def imports(path: Path) -> set[str]:
    """The layers of resq_kernels that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resq_kernels"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == "resq_kernels" and len(name) > 1}
    return found


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_layer_imports_only_what_the_arrows_allow(layer: str) -> None:
    single = PACKAGE / f"{layer}.py"
    paths = [single] if single.exists() else sorted((PACKAGE / layer).rglob("*.py"))
    for path in paths:
        extra = imports(path) - ALLOWED[layer] - {layer}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_every_layer_has_its_arrows() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("layer", sorted(USERS))
def test_layer_is_imported_by_its_users_alone(layer: str) -> None:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    outside = {name: path for name, path in paths.items() if name.split("/")[0] != layer}
    assert {name for name, path in outside.items() if layer in imports(path)} == USERS[layer]


def includes(path: Path) -> list[str]:
    return re.findall(r'#include [<"]([^">]+)[">]', path.read_text())


def test_core_is_free_of_torch_cuda_and_instruction_sets() -> None:
    for path in (ROOT / "csrc/core").iterdir():
        for name in includes(path):
            assert name.startswith("core/") or re.fullmatch(r"[a-z_0-9]+", name), (path.name, name)


def test_torch_headers_stay_in_the_registration_files() -> None:
    for path in [*(ROOT / "csrc/ops").rglob("*"), *(ROOT / "csrc/cpu").rglob("*")]:
        if path.is_dir() or re.search(r"_(cpu|cuda)\.cpp$|_torch\.h$|isa_query\.cpp$", path.name):
            continue
        torch_headers = [name for name in includes(path) if name.startswith("torch/")]
        assert not torch_headers, (path.name, torch_headers)


def test_cuda_runtime_headers_stay_in_files_for_nvcc() -> None:
    """Host files reach a kernel through its launcher, so they compile without a toolkit."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh") or path.is_dir():
            continue
        names = [n for n in includes(path) if re.match(r"cuda_|cute/|cutlass/|.*\.cuh$", n)]
        assert not names, (path.name, names)


def test_kernels_are_launched_and_errors_taken_in_one_place() -> None:
    """cuda/launch.cu: a launch that bypassed it could drop its error or take another's."""
    calls = re.compile(r"<<<.*>>>\(|cudaLaunchKernel|cudaGetLastError|cudaFuncSetAttribute")
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_dir() or path.name in ("launch.cu", "tensor_map.cu"):
            continue
        code = re.sub(r"//.*", "", path.read_text())
        assert not calls.search(code), path.name


def test_graphs_are_captured_in_the_mode_of_the_thread() -> None:
    """In the default mode, "global", a cudaMalloc of any other thread ends the capture."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests/gpu").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.graph":
                mode = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert mode.get("capture_error_mode") == "'thread_local'", path


def test_no_file_is_longer_than_500_lines() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh"}
    paths = [ROOT / name for name in tracked.split() if Path(name).suffix in suffixes]
    if not paths:
        pytest.skip("not a git checkout: nothing lists the project's own files")
    too_long = {p.name: n for p in paths if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not too_long


def test_vector_kernels_are_chosen_by_the_vector_set() -> None:
    """A switch over current_isa() would run its default, the scalar kernel, under AMX."""
    for path in (ROOT / "csrc/ops").rglob("*"):
        if path.is_file() and "current_isa()" in path.read_text():
            assert path.name == "mixed_gemm_cpu.cpp"
