"""`import resq_kernels` is light, and registers with transformers in whatever order they come."""

import importlib
import importlib.machinery
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import resq_kernels
import resq_kernels_autoload
from resq_kernels import _library
from resq_kernels.testing.quantized_models import random_quantized


def run(code: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run(
        # Elsewhere than in this checkout, which may hold metadata of an older build.
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=sys.prefix,
    )
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
        # Nobody imports resq_kernels; a module of transformers may be half imported when torch is.
        "from transformers import AutoModelForCausalLM",
        "from transformers.quantizers import HfQuantizer\n"
        "from transformers import AutoModelForCausalLM",
        "from transformers.modeling_utils import PreTrainedModel\n"
        "from transformers import AutoModelForCausalLM",
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


@pytest.mark.slow
def test_without_this_package_a_folder_does_not_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would get random weights instead, and talk nonsense."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    found = run(
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "import json, sys\n"
        "words = ['resq_kernels' in sys.modules]\n"
        "for auto in (AutoModel, AutoModelForCausalLM):\n"
        "    try:\n"
        f"        auto.from_pretrained({str(folder)!r})\n"
        "    except RuntimeError as error:\n"
        "        words.append('ignore_mismatched_sizes' in str(error))\n"
        "print(json.dumps(words))\n"
    )
    assert found == [False, True, True]


@pytest.mark.slow
def test_a_fault_of_this_package_stops_no_other_program(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that does not load, say: torch and transformers are imported all the same."""
    broken = tmp_path / "resq_kernels"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('_C_cpu.so does not load')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run(
        "import json, torch, warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1))\n"
        "words = [str(w.message) for w in seen if 'resq_kernels' in str(w.message)]\n"
        "try:\n"
        f"    AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "    words.append('it loads')\n"
        "except RuntimeError as error:\n"
        "    print(json.dumps(words))\n"
    )
    expected = "models quantized with ResQ do not load in this program: _C_cpu.so does not load"
    assert found == [f"resq_kernels: {expected}"]


@pytest.mark.parametrize("action", ["default", "error"])
def test_a_fault_of_the_adapter_is_said(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where warnings are errors, too: raised, one would break the import of transformers."""
    words = "models quantized with ResQ do not load in this program: No module named 'missing'"
    monkeypatch.setattr(resq_kernels_autoload, "_TRANSFORMERS", "missing")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        resq_kernels_autoload._import_adapter.__wrapped__("missing")
    said = [str(warning.message) for warning in seen] + capsys.readouterr().err.splitlines()
    assert said == [f"resq_kernels: {words}"]


def test_other_import_hooks_see_the_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours comes first, but another finder of a module it waits for is asked all the same."""
    (tmp_path / "awaited.py").write_text("loader = __spec__.loader\n")
    asked, imported = [], []

    class Other:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any = None) -> Any:
            asked.append(name)
            return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)], target)

    monkeypatch.setattr(resq_kernels_autoload, "TRIGGERS", {"awaited": 1})
    monkeypatch.setattr(resq_kernels_autoload, "_import_adapter", imported.append)
    ours = resq_kernels_autoload._Finder()
    monkeypatch.setattr(sys, "meta_path", [ours, object(), Other, *sys.meta_path])
    module = importlib.import_module("awaited")
    try:
        assert asked == ["awaited"] and imported == [1]
        plain = importlib.machinery.SourceFileLoader
        loaders = (module.loader, module.__loader__, module.__spec__.loader)
        assert [type(loader) for loader in loaders] == [plain] * 3
        assert importlib.reload(module) is module and imported == [1, 1]
    finally:
        del sys.modules["awaited"]


def test_importing_torch_imports_no_more_than_the_entry_point() -> None:
    found = run(
        "import json, sys, torch\n"
        "print(json.dumps(sorted(name for name in sys.modules if 'resq' in name)))\n"
    )
    assert [name for name in found if not name.startswith("__editable__")] == [
        "resq_kernels_autoload"
    ]


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
