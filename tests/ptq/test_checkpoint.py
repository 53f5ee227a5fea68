"""Reading, writing and refusing folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import resq_kernels
from resq_kernels.architecture import GUARD, ModelShape
from resq_kernels.checkpoint import checked, validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.safetensors_io import (
    INDEX_FILE,
    CheckpointError,
    CheckpointReader,
    ShardWriter,
    tensors_hash,
)
from resq_kernels.testing.quantized_models import make_older

WEIGHTS = "model.safetensors"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    tokens = torch.randint(0, 256, (2, 32))
    quantize_folder(llama, folder, tokens, ResQConfig(weights="rtn"), progress=False)
    return folder


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(quantized, tmp_path / "copy")


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path) -> torch.Tensor:
    """The logits of a quantized folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(9)[None]).logits
    return logits


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        validate(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message or "quantization_config" in message
    return message


def read_by_another_loader(folder: Path) -> dict[str, torch.Tensor]:
    """What `checked` passes on of all tensors of the folder."""
    content = json.loads((folder / "config.json").read_text())
    shape, entry = ModelShape.from_config(content), content["quantization_config"]
    return dict(checked(load_file(folder / WEIGHTS).items(), shape, entry, folder))


def tensor_refusal(folder: Path) -> str:
    """Of a folder with a wrong tensor: `checked` says the same."""
    message = refusal(folder)
    with pytest.raises(CheckpointError) as error:
        read_by_another_loader(folder)
    assert str(error.value) == message
    return message


def test_a_good_folder_passes(quantized: Path) -> None:
    assert validate(quantized) == ResQConfig(weights="rtn")
    stored = load_file(quantized / WEIGHTS)
    del stored[GUARD]
    passed = read_by_another_loader(quantized)
    assert passed.keys() == stored.keys()
    assert all(torch.equal(passed[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_file(copy: Path, keep: int) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:keep])
    message = refusal(copy)
    assert "truncated" in message and WEIGHTS in message
    size = len(content[:keep])
    assert f"got {size}" in message or f"a file of {size}" in message


def test_file_with_a_tail(copy: Path) -> None:
    with (copy / WEIGHTS).open("ab") as stream:
        stream.write(b"x")
    assert "damaged" in refusal(copy)


def test_header_that_is_not_json(copy: Path) -> None:
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[8:16] = b"\xff" * 8
    (copy / WEIGHTS).write_bytes(content)
    assert "expected a safetensors header" in refusal(copy)


def test_missing_tensor(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(SCALE))
    assert tensor_refusal(copy).endswith(f"{SCALE}: expected a tensor, found nothing")


def test_unexpected_tensor(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(1)}))
    assert "model.layers.0.mlp.up_proj.weight: expected no such tensor" in tensor_refusal(copy)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda scale: scale[:-1].clone(), "got float32 [191, 2]"),
        (lambda scale: scale.half(), "got float16 [192, 2]"),
        (lambda scale: scale[:, :1].clone(), "got float32 [192, 1]"),
    ],
)
def test_wrong_shape_or_dtype(
    copy: Path, change: Callable[[torch.Tensor], torch.Tensor], got: str
) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({SCALE: change(tensors[SCALE])}))
    assert tensor_refusal(copy).endswith(f"{SCALE}: expected float32 [192, 2], {got}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scale_that_is_not_one(copy: Path, value: float) -> None:
    edit_tensors(copy, lambda tensors: tensors[SCALE].__setitem__((3, 0), value))
    message = tensor_refusal(copy)
    assert f"{SCALE}: expected finite scales" in message and message.endswith(str(value))


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.key_rotation", "model.embed_tokens.basis.rotation"]
)
def test_rotation_of_another_model(copy: Path, name: str) -> None:
    def turn(tensors: dict) -> None:
        tensors[name].view(-1)[0] += 0.25

    edit_tensors(copy, turn)
    assert "rotation: expected the hash sha256:" in tensor_refusal(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format_version", 7, "format_version: expected 1 to 6, got 7; a newer resq_kernels"),
        ("format_version", "1", "format_version: expected 1 to 6, got '1'"),
        ("format_version", 3, "activation_clip: expected 1 in format_version 3"),
        ("activation_clip", 0.0, "activation_clip: expected (0, 1], got 0.0"),
        ("quant_method", "gptq", "quant_method: expected 'resq', got 'gptq'"),
        ("lo_bits", 3, "lo_bits: expected one of 4, 8, got 3"),
        ("hadamard", False, "hadamard: expected True, got False"),
        ("weight_bits", [4], "weight_bits: expected [4, 8], got [4]"),
        ("high_fraction", 0.3, "high_fraction 0.3 of"),
        ("embedding_bits", 4, "embedding_bits: expected one of 8, 16, got 4"),
        ("tied_head", 1, "tied_head: expected false, or true with embedding_bits 8, got 1"),
        ("seed", None, None),
        ("embedding_bits", None, None),
        ("tied_head", None, None),
        ("hadamard_block", None, None),
        ("hadamard_block", 0, "mlp.down_proj.weight_lo: expected uint8"),
        ("hadamard_block", 48, "hadamard_block: expected one of None, 0, 8, 16, 32, 64, 128, 256"),
    ],
)
def test_wrong_quantization_config(copy: Path, key: str, value: object, words: str | None) -> None:
    def change(content: dict) -> None:
        if words is None:
            del content["quantization_config"][key]
        else:
            content["quantization_config"][key] = value

    edit_config(copy, change)
    assert (words or f"{key}: expected a value, got nothing") in refusal(copy)


def test_the_head_that_the_configuration_names(copy: Path) -> None:
    edit_config(copy, lambda content: content["quantization_config"].update(tied_head=True))
    assert "lm_head.gain: expected a tensor, found nothing" in refusal(copy)
    edit_tensors(copy, lambda tensors: tensors.update({"lm_head.gain": torch.eye(128)}))
    assert "lm_head.weight_hi: expected no such tensor, found one" in refusal(copy)


def test_a_folder_of_format_1(llama: Path, tmp_path: Path) -> None:
    """It had no key of the vocabulary, which was in 16 bits."""
    config = ResQConfig(weights="rtn", embedding_bits=16, activation_clip=1.0, hadamard_block=0)
    quantize_folder(llama, tmp_path / "out", torch.randint(0, 256, (2, 32)), config, progress=False)

    make_older(tmp_path / "out", 1)

    def older(content: dict) -> None:
        del content["quantization_config"]["embedding_bits"]
        del content["quantization_config"]["tied_head"]

    edit_config(tmp_path / "out", older)
    assert validate(tmp_path / "out") == config


@pytest.mark.parametrize("version", [3, 4])
def test_a_folder_of_whole_rows(llama: Path, tmp_path: Path, version: int) -> None:
    """Formats before 5 had no blocks, and nothing of down_proj in INT8."""
    clip = {"activation_clip": 1.0} if version == 3 else {}
    config = ResQConfig(weights="rtn", hadamard_block=0, **clip)
    quantize_folder(llama, tmp_path / "out", torch.randint(0, 256, (2, 32)), config, progress=False)
    logits = load(tmp_path / "out")
    make_older(tmp_path / "out", version)
    assert validate(tmp_path / "out") == config
    assert torch.equal(load(tmp_path / "out"), logits)


def test_other_architecture_and_tied_head(copy: Path) -> None:
    edit_config(copy, lambda content: content.update(tie_word_embeddings=True))
    assert "tie_word_embeddings: expected false, got true" in refusal(copy)
    edit_config(copy, lambda content: content.update(model_type="mamba"))
    expected = "llama, mistral, qwen2, qwen3, smollm3"
    assert f"model_type: expected one of {expected}, got 'mamba'" in refusal(copy)


def test_files_that_are_not_there(copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).rename(copy / "other.safetensors")
    assert f"expected {WEIGHTS} or {INDEX_FILE}, found neither" in refusal(copy)
    (copy / INDEX_FILE).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "gone.safetensors: expected a safetensors file, found nothing" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "config.json: expected JSON" in refusal(copy)
    with pytest.raises(CheckpointError, match="expected a model folder, found no folder"):
        CheckpointReader(tmp_path / "nowhere")


@pytest.mark.parametrize("sizes", [("100KB", "5GB"), ("5GB", "100KB", "5GB"), ("60KB", "100KB")])
def test_a_model_that_is_saved_over_its_own_files(
    copy: Path, tmp_path: Path, sizes: tuple[str, ...]
) -> None:
    """transformers leaves the older index, or the older single file, where it is."""
    model = AutoModelForCausalLM.from_pretrained(copy)
    for size in sizes:
        model.save_pretrained(tmp_path / "again", max_shard_size=size)
    validate(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.randint(0, 256, (2, 20))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_variant_is_validated_and_loaded(copy: Path, tmp_path: Path, size: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(copy)
    folder, ids = tmp_path / "variant", torch.randint(0, 256, (2, 20))
    model.save_pretrained(folder, variant="fp16", max_shard_size=size)
    for load in (AutoModelForCausalLM.from_pretrained, resq_kernels.from_pretrained):
        assert torch.equal(load(folder, variant="fp16")(ids).logits, model(ids).logits)
    assert "expected model.safetensors or model.safetensors.index.json, found" in refusal(folder)
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    shard = next(path for path in sorted(folder.glob("*fp16*.safetensors")))
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name][:-1].clone()}, shard, metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, resq_kernels.from_pretrained):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load(folder, variant="fp16")


def test_shards_round_trip(tmp_path: Path) -> None:
    tensors = {
        f"t{i}": torch.randn(size, 7).to(dtype)
        for i, (size, dtype) in enumerate(
            [(3, torch.float32), (0, torch.bfloat16), (40, torch.float16), (1, torch.float64)]
        )
    }
    (tmp_path / "config.json").write_text("{}")
    writer = ShardWriter(tmp_path, max_bytes=200)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert not list(tmp_path.glob("*.safetensors"))
    total = writer.finish()
    assert total == sum(t.numel() * t.element_size() for t in tensors.values())
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    reader = CheckpointReader(tmp_path)
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.load(name), tensor) and reader.load(name).dtype == tensor.dtype
    assert torch.equal(reader.load_rows("t2", 5, 9), tensors["t2"][5:9])


def test_hash_sees_every_bit_and_the_order() -> None:
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4).half()
    assert tensors_hash([a, b]) != tensors_hash([b, a])
    changed = a.clone()
    changed[2, 4] = torch.nextafter(changed[2, 4], torch.tensor(9.0, dtype=torch.float64))
    assert tensors_hash([a]) != tensors_hash([changed])
    assert tensors_hash([]) == tensors_hash([torch.empty(0)])
