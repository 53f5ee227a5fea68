"""What the build asks for (tools/build_backend.py): only what is not there."""

from __future__ import annotations

import importlib.util
import site
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The backend as pip runs it: sys.path holds no package of the user's environment, tmp_path."""
    path = ROOT / "tools/build_backend.py"
    spec = importlib.util.spec_from_file_location("build_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def find_spec(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(module, "ROOT", tmp_path)  # no submodule
    for name in ("CUTLASS_PATH", "CUDA_HOME", "RESQ_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RESQ_CUDA", "0")
    return module


def install(folder: Path, name: str, version: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        (None, ["torch>=2.11"]),
        ("2.10.1", ["torch>=2.11"]),
        ("2.11.0", []),
        ("2.13.0+cpu", []),
        ("3.0.0a0+git1234", []),
    ],
)
def test_torch_is_asked_for_where_none_new_enough_is(
    backend: ModuleType, tmp_path: Path, version: str | None, wanted: list[str]
) -> None:
    if version:
        install(tmp_path, "torch", version)
    assert backend.missing() == wanted
    assert backend.find_torch() == (None if wanted else tmp_path / "torch")


def test_cutlass_is_asked_for_where_nvcc_is_and_no_headers_are(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "torch", "2.13.0")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert backend.missing() == []  # RESQ_CUDA=0
    monkeypatch.setenv("RESQ_CUDA", "1")
    assert backend.find_nvcc() == str(nvcc)
    assert backend.missing() == ["nvidia-cutlass==4.2.0.0"]

    install(tmp_path, "cutlass_library", "4.2.0.0")
    for folder in ("cutlass_library/source", "third_party/cutlass"):
        header = tmp_path / folder / "include/cutlass/version.h"
        header.parent.mkdir(parents=True)
        header.touch()
        assert backend.missing() == []
        assert backend.find_cutlass() == tmp_path / folder / "include"
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "nothing"))  # it alone counts
    assert backend.find_cutlass() is None
