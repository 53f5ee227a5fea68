"""`import resq_kernels` is light, and registers with transformers in whatever order they come."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import resq_kernels
from resq_kernels import _library
from resq_kernels.testing.quantized_models import random_quantized


def run(code: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_neither_transformers_nor_cuda() -> None:
    found = run(
        "import json, sys, torch, resq_kernels\n"
        "heavy = ('transformers', 'vllm', 'safetensors', 'matplotlib', 'resq_kernels.nn',\n"
        "         'resq_kernels.ptq')\n"
        "print(json.dumps({'loaded': [name for name in heavy if name in sys.modules],\n"
        "                  'cuda': torch.cuda.is_initialized(),\n"
        "                  'ops': hasattr(torch.ops.resq, 'mixed_gemm')}))\n"
    )
    assert found == {"loaded": [], "cuda": False, "ops": True}


def test_the_linear_layer_needs_no_transformers() -> None:
    found = run(
        "import json, sys, torch, resq_kernels as resq\n"
        "layer = resq.ResQLinear.from_linear(torch.nn.Linear(64, 8), high_columns=16)\n"
        "y = layer(torch.ones(2, 64))\n"
        "print(json.dumps([list(y.shape), 'transformers' in sys.modules]))\n"
    )
    assert found == [[2, 8], False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_quantized("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import resq_kernels; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import resq_kernels",
        "import transformers, resq_kernels; from transformers import AutoModelForCausalLM",
    ],
)
def test_a_folder_loads_in_any_order_of_imports(imports: str, folder: Path) -> None:
    found = run(
        f"{imports}\n"
        "import json\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(json.dumps({'type': type(model.model.layers[0].self_attn).__name__}))\n"
    )
    assert found == {"type": "ResQAttention"}


def test_public_names() -> None:
    for name in resq_kernels.__all__:
        assert getattr(resq_kernels, name).__module__.startswith("resq_kernels.")
    assert set(resq_kernels.__all__) <= set(dir(resq_kernels)) | set(resq_kernels._LAZY)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        resq_kernels.nonsense  # noqa: B018


def test_a_torch_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(ImportError, match=r"expected torch >= 2.11, got 2.10.1\+cpu"):
        _library.load()


def test_the_cuda_library_says_why_it_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in _library.load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    monkeypatch.setattr(_library, "refuse_cuda", refused.append)
    why = _library.load_cuda()
    assert why.startswith("_C_cuda.so is not built: install the CUDA toolkit")
    assert refused == [why]
    (tmp_path / "_C_cuda.so").write_text("not a library")
    with pytest.raises(ImportError, match="_C_cuda.so does not load: .*"):
        _library.load_cuda()


def test_operators_say_why_they_do_not_run_on_cuda() -> None:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    call = torch.ops.resq.hadamard.default.redispatch
    if _library.CUDA_MISSING == "":
        pytest.skip("the CUDA kernels are registered")
    library = _library.refuse_cuda("there is no library")
    try:
        message = "hadamard: device: expected tensors on the CPU, got cuda: there is no library"
        with pytest.raises(RuntimeError, match=message):
            call(cuda, torch.ones(2, 4), 1.0)
    finally:
        library._destroy()
    with pytest.raises(NotImplementedError):
        call(cuda, torch.ones(2, 4), 1.0)
