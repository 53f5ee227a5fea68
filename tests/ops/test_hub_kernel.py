"""Builds of the operators for the Hugging Face hub (tools/hub_kernel.py).

What needs such a build, and the package `kernels`, runs under `make test-hub`, which names the
folder in RESQ_HUB_KERNEL.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from decoder_cases import PAGE, Case

from resq_kernels import kv_pages, ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import hub_kernel  # noqa: E402

FOLDER = os.environ.get("RESQ_HUB_KERNEL")
needs_build = pytest.mark.skipif(FOLDER is None, reason="make test-hub builds it and runs this")
EXAMPLES = [
    example
    for page in ("tools/hub/README.md", "docs/integrations.md")
    for example in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    if "from kernels import" in example
]


def test_files_of_a_build_know_neither_the_package_nor_its_operators() -> None:
    paths = hub_kernel.python_files()
    modules = {getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__}
    assert {path.stem for path in paths} > modules
    for path in paths:
        text = hub_kernel.standalone(path, "_other")
        assert "torch.ops.resq" not in text and "resq::" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("resq_kernels") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert "resq_kernels" not in (node.module or ""), path
    assert 'NAMESPACE = "_other"' in hub_kernel.standalone(paths[0], "_other")  # _library.py
    text = hub_kernel.standalone(hub_kernel.PACKAGE / "ops/mixed_quantize.py", "_other")
    assert "from .. import _library\nfrom ..formats import MixedTensor\n" in text
    assert "torch.ops._other.mixed_quantize.default" in text


def test_a_file_that_imports_what_is_not_in_a_build_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_kernel, "PACKAGE", tmp_path)
    (tmp_path / "formats.py").write_text("from resq_kernels.config import ResQConfig\n")
    with pytest.raises(ValueError, match=r"^formats.py: config: expected a module of \('_libr"):
        hub_kernel.standalone(tmp_path / "formats.py", "_other")


def test_an_id_is_that_of_the_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = hub_kernel.identifier("cpu"), hub_kernel.identifier("cuda")
    assert re.fullmatch(r"_resq_kernels_cpu_[0-9a-f]{7}", cpu)
    assert cuda == cpu.replace("_cpu_", "_cuda_")
    monkeypatch.setattr(hub_kernel, "python_files", list)
    assert hub_kernel.identifier("cpu") != cpu


def test_archs_in_the_hub_s_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESQ_CUDA_ARCHS", raising=False)
    assert hub_kernel.hub_archs() == ["8.0", "8.0+PTX", "8.6", "8.9", "9.0"]
    monkeypatch.setenv("RESQ_CUDA_ARCHS", "90a;120")
    assert hub_kernel.hub_archs() == ["12.0", "9.0"]


def test_symbols_of_a_newer_system_are_named(tmp_path: Path) -> None:
    old = b"\0GLIBC_2.28\0GLIBCXX_3.4.24\0CXXABI_1.3.11\0GLIBC_PRIVATE\0"
    (tmp_path / "_C.so").write_bytes(old)
    assert hub_kernel.newer_symbols(tmp_path) == []
    (tmp_path / "_C.so").write_bytes(old + b"GLIBC_2.34\0GLIBCXX_3.4.5\0CXXABI_1.3.13\0")
    assert hub_kernel.newer_symbols(tmp_path) == ["CXXABI_1.3.13", "GLIBC_2.34"]


@pytest.mark.parametrize("name", ["mine", "build/mine/x"])
def test_another_folder_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "build" / hub_kernel.VARIANTS["cpu"]).mkdir(parents=True)
    (tmp_path / "README.md").touch()
    assert hub_kernel.is_ours(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for folder in (tmp_path, tmp_path / "README.md", ROOT):
        with pytest.raises(SystemExit, match="--out: expected a folder that this program wrote, "):
            hub_kernel.main(["--out", str(folder), "--backends", "cpu"])
    assert (tmp_path / name).exists()


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    from kernels import get_local_kernel

    assert FOLDER is not None
    loaded: ModuleType = get_local_kernel(Path(FOLDER))
    return loaded


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        same: bool = a.dtype == b.dtype and torch.equal(a, b)
        return same
    return len(a) == len(b) and all(map(equal, a, b))


@needs_build
def test_every_operator_has_the_bits_of_the_package_beside_it(kernel: ModuleType) -> None:
    assert set(ops.__all__) < set(kernel.__all__)
    own = getattr(torch.ops, kernel.__name__)
    case = Case([40, 3], [1, 9], torch.bfloat16, operators=own)
    given, same = case.arguments(), case.arguments()
    assert equal(kernel.decoder_layers(**given), ops.decoder_layers(**same))
    assert equal(given["caches"], same["caches"]) and not equal(given["caches"], case.caches)
    found = case.one_by_one()  # seven operators
    case.operators = torch.ops.resq
    assert equal(found, case.one_by_one())

    lo, hi = torch.randint(0, 256, (70, 12), dtype=torch.uint8), torch.randint(-128, 128, (70, 8))
    packed = kernel.pack_weight(lo, hi.to(torch.int8))
    assert equal(packed, ops.pack_weight(lo, hi.to(torch.int8)))
    assert equal(kernel.unpack_weight(packed, 70, 24, 8), (lo, hi.to(torch.int8)))
    ids, scale = torch.tensor([[69, 0, 7]]), torch.rand(70, 2)
    rows = (ids, packed, scale, 24, 8, torch.float16)
    assert equal(kernel.embedding(*rows), ops.embedding(*rows))
    x = torch.randn(3, 96)
    assert equal(kernel.hadamard(x, 0.5), ops.hadamard(x, 0.5))
    table, lens = case.table.clamp_max(0), torch.tensor([5, 0], dtype=torch.int32)
    pages = (given["caches"][0], table, lens, PAGE, case.head_dim, torch.float32)
    assert equal(kernel.kv_dequantize(*pages), ops.kv_dequantize(*pages))


@needs_build
def test_what_describes_arguments_comes_with_the_operators(kernel: ModuleType) -> None:
    assert kernel.cache_shape(3, 2, 64, 128) == kv_pages.cache_shape(3, 2, 64, 128)
    weight, x = torch.randn(70, 40), torch.randn(5, 40, dtype=torch.float64).float()
    codes = kernel.quantize_weight(weight, high_columns=8)
    packed, rows = kernel.PackedWeight.pack(codes), kernel.mixed_quantize(x, 8)
    assert isinstance(rows, kernel.MixedTensor) and isinstance(codes, kernel.QuantizedWeight)
    given = (*rows, packed.data, packed.scale, packed.sums, None, torch.float32)
    y = kernel.mixed_gemm(*given)
    exact = rows.dequantize().double() @ codes.dequantize().double().T
    # Two float32 sums of exact products, each rounded a few times.
    bound = 8 * 2.0**-24 * (rows.dequantize().double().abs() @ codes.dequantize().double().abs().T)
    assert ((y - exact).abs() <= bound).all()
    assert not ((y * (1 + 2.0**-18) - exact).abs() <= bound).all()
    compiled = torch.compile(lambda x: kernel.mixed_gemm(*kernel.mixed_quantize(x, 8), *given[3:]),
                             fullgraph=True)  # fmt: skip
    assert torch.equal(compiled(x), y)
    with pytest.raises(RuntimeError, match="^mixed_quantize: x: expected a tensor that needs no "):
        kernel.mixed_quantize(x.requires_grad_(), 8)


@needs_build
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_without_the_package(example: str, tmp_path: Path) -> None:
    """Those of the card, from the hub (a folder in its place), and of docs/integrations.md."""
    assert len(EXAMPLES) == 2
    assert FOLDER is not None
    (tmp_path / "out/hub").mkdir(parents=True)
    (tmp_path / "out/hub/resq-kernels").symlink_to(FOLDER)
    example += """
import sys
loaded = [name for name in sys.modules if name.startswith("resq_kernels")]
assert loaded in ([], ["resq_kernels_autoload"]), loaded  # torch's entry point
error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
assert 0.05 < error < 0.25, error  # of a random weight in 4 bits
print(resq.__name__)
"""
    variables = {"LOCAL_KERNELS": f"ORGANISATION/resq-kernels={FOLDER}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metadata = Path(FOLDER) / "build" / hub_kernel.VARIANTS["cpu"] / "metadata.json"
    assert done.stdout.strip() == json.loads(metadata.read_text())["id"]


@needs_build
def test_hashes_are_those_that_the_hub_computes() -> None:
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    assert FOLDER is not None
    for folder in Path(FOLDER).glob("build/*"):
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert Digest.hash_variant(DigestAlgorithm.SHA256, folder).files == metadata.digest.files
        assert metadata.id.isidentifier() and metadata.name.python_name == "resq_kernels"


@needs_build
@pytest.mark.parametrize(
    ("backend", "torch_version", "expected"),
    [
        ("cpu", "2.10", None),
        ("cpu", "2.11", "cpu"),
        ("cpu", "2.14", "cpu"),
        ("cu126", "2.13", None),
        ("cu130", "2.11", "cuda"),
        ("cu132", "2.14", "cuda"),
        ("rocm72", "2.13", None),
    ],
)
def test_which_build_a_machine_gets(backend: str, torch_version: str, expected: str | None) -> None:
    from kernels import variants
    from kernels.backends import parse_backend
    from packaging.version import Version

    built = [variants.parse_variant(name) for name in hub_kernel.VARIANTS.values()]
    machine = (parse_backend(backend), "x86_64", "linux", Version(torch_version), True, None)
    chosen, _ = variants._resolve_variant_for_system(built, *machine)
    names = [variant.variant_str for variant in chosen]
    assert names == ([hub_kernel.VARIANTS[expected]] if expected else [])
