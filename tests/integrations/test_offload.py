"""Movers of single tensors (accelerate's offloading, device maps, meta): the same bits, or refused.

The layout of packed codes belongs to a kind of device, and codes are not parameters.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from resq_kernels import ResQConfig
from resq_kernels.checkpoint import StoredFormat
from resq_kernels.integrations.transformers import ResQQuantizer, prepare
from resq_kernels.nn.convert import pack
from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.arange(5, 30)[None]
CPU = dict.fromkeys(
    (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ),
    "cpu",
)
ONE_ON_DISK = {**CPU, "model.layers.1": "disk"}
OFFLOAD_HOOK = "expected a module that stays on its device, got accelerate's offload hook"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    random_quantized("llama", tie_word_embeddings=request.param).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, CPU], ids=str)
def test_a_map_of_one_device_works(folder: Path, model: Any, device_map: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"device_map": ONE_ON_DISK}, "cpu and disk"),
        ({"device_map": dict.fromkeys(CPU, "disk")}, "disk"),
        ({"device_map": {**CPU, "lm_head": 0}}, "cpu and cuda"),
        ({"device_map": {**CPU, "lm_head": "cuda:1"}}, "cpu and cuda"),
        ({"device_map": "meta"}, "meta"),
        ({"device_map": "auto", "max_memory": {"cpu": 100_000}}, "cpu and disk"),
    ],
    ids=str,
)
def test_a_map_that_offloads_is_refused(
    folder: Path, tmp_path: Path, arguments: dict[str, Any], got: str
) -> None:
    with pytest.raises(ValueError, match=f"ResQ: device_map: expected .* got {got}: "):
        AutoModelForCausalLM.from_pretrained(folder, offload_folder=str(tmp_path), **arguments)


def test_a_map_of_gpus_is_not_refused() -> None:
    entry = random_quantized("llama").config.quantization_config
    ResQQuantizer(entry).validate_environment(device_map={"model": 0, "lm_head": "cuda:1"})


OFFLOADERS: dict[str, Callable[[Any, str], Any]] = {
    "cpu_offload": lambda m, _: accelerate.cpu_offload(m, "cpu"),
    "cpu_offload buffers": lambda m, _: accelerate.cpu_offload(m, "cpu", offload_buffers=True),
    "disk_offload": lambda m, at: accelerate.disk_offload(m, at, "cpu"),
    "dispatch_model": lambda m, at: accelerate.dispatch_model(m, ONE_ON_DISK, "cpu", None, at),
    "dispatch_model buffers": lambda m, at: accelerate.dispatch_model(
        m, ONE_ON_DISK, "cpu", None, at, offload_buffers=True
    ),
}


@pytest.mark.parametrize("way", OFFLOADERS)
def test_accelerate_offloading_is_refused(model: Any, tmp_path: Path, way: str) -> None:
    expected = logits(model)
    with pytest.raises(ValueError, match=OFFLOAD_HOOK):
        OFFLOADERS[way](model, str(tmp_path))
    assert torch.equal(logits(model), expected)  # what was moved is back


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    "name", ["embed_tokens", "layers.0.mlp.down_proj", "layers.1.self_attn.qkv_proj"]
)
def test_an_offload_hook_is_refused(model: Any, name: str, buffers: bool) -> None:
    expected, module = logits(model), model.model.get_submodule(name)
    hook = AlignDevicesHook(execution_device="cpu", offload=True, offload_buffers=buffers)
    for append in (False, True):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        with pytest.raises(ValueError, match=OFFLOAD_HOOK):
            add_hook_to_module(module, hook, append=append)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "name", ["", "model.layers.0", "model.layers.0.self_attn", "model.layers.0.input_layernorm"]
)
def test_hooks_on_modules_without_packed_codes_of_their_own(
    model: Any, name: str, tmp_path: Path
) -> None:
    expected, module = logits(model), model.get_submodule(name)
    hook = AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
    add_hook_to_module(module, hook)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="save_pretrained: .*: expected a tensor with values"):
        model.save_pretrained(tmp_path)


def test_a_hook_that_offloads_the_whole_decoder(model: Any) -> None:
    """Its embedding is read before the hook brings the scale back."""
    hook = AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
    add_hook_to_module(model.model, hook)
    with pytest.raises(RuntimeError, match="embedding: weight_scale: expected a tensor on cpu"):
        logits(model)


def test_hooks_that_do_not_offload(model: Any, tmp_path: Path) -> None:
    expected = logits(model)
    accelerate.dispatch_model(model, CPU, "cpu", force_hooks=True)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_a_checkpoint_loaded_by_accelerate(folder: Path, model: Any) -> None:
    expected = logits(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_scale.mul_(3)
    assert not torch.equal(logits(model), expected)
    accelerate.load_checkpoint_in_model(model, str(folder))
    assert torch.equal(logits(model), expected)
    with pytest.raises(AttributeError, match=r"call unfuse\(\) first"):
        accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map=CPU)


def test_meta_models_are_refused(folder: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_pretrained: .*: expected a tensor with values"):
        model.to("meta").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ResQEmbedding: expected a packed weight"):
        logits(model)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    prepare(empty, StoredFormat(ResQConfig(), config.tie_word_embeddings))
    with pytest.raises(RuntimeError, match="ResQEmbedding: expected a packed weight"):
        logits(empty)
    with pytest.raises(RuntimeError, match="pack: .*: expected a loaded tensor, got one on the"):
        pack(empty)


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("mlp.gate_up_proj", "packed_weight", "expected the layout of meta, got that of cpu"),
        ("mlp.gate_up_proj", "weight_sum", "mixed_gemm: weight_sum: expected a tensor on cpu"),
        ("mlp.gate_up_proj", "weight_scale", "mixed_gemm: weight_scale: expected a tensor on cpu"),
        ("mlp.down_proj", "weight_scale", "mixed_gemm: weight_scale: expected a tensor on cpu"),
        ("input_layernorm", "weight", "rms_norm_quantize: weight: expected a tensor on cpu"),
        ("self_attn", "key_rotation", "kv_append: key_rotation: expected a tensor on cpu"),
    ],
)
def test_one_tensor_on_meta_is_refused(model: Any, module: str, name: str, words: str) -> None:
    owner = model.model.layers[0].get_submodule(module)
    held = owner._buffers if name in owner._buffers else owner._parameters
    moved = held[name].to("meta")
    held[name] = torch.nn.Parameter(moved, False) if held is owner._parameters else moved
    with pytest.raises(RuntimeError, match=words):
        logits(model)


def test_a_state_that_accelerate_saved(tmp_path: Path) -> None:
    """Its saver leaves out tensors without elements: a part that no column belongs to."""
    model = random_quantized("llama", ResQConfig(hadamard_block=0))
    assert model.model.layers[0].mlp.down_proj.weight_hi is None  # packed
    assert model.state_dict()["model.layers.0.mlp.down_proj.weight_hi"].numel() == 0
    expected = logits(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        prepared.model.norm.weight.mul_(torch.linspace(1, 3, len(prepared.model.norm.weight)))
        prepared.model.layers[0].mlp.down_proj.weight_scale.mul_(3)
    assert not torch.equal(logits(prepared), expected)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(prepared), expected)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def reloaded(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    "change",
    [
        copy.copy,
        copy.deepcopy,
        pickled,
        reloaded,
        torch.nn.Module.share_memory,
        torch.nn.Module.float,
        torch.nn.DataParallel,
        lambda model: accelerate.cpu_offload_with_hook(model, "cpu")[0],
        lambda model: torch.ao.quantization.quantize_dynamic(model, inplace=False),
    ],
)
def test_what_keeps_the_bits(model: Any, change: Callable[[Any], Any]) -> None:
    expected = logits(model)
    assert torch.equal(logits(change(model)), expected)


def test_float64_is_refused(model: Any) -> None:
    with pytest.raises(RuntimeError, match="dtype: expected float32, float16 or bfloat16, got fl"):
        logits(model.double())
