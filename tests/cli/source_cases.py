"""One tiny model as sources of several kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import POSITIONS, save, tiny_llama
from safetensors.torch import load_file, save_file

from resq_kernels.testing.tiny_gguf import stored_weights, write_gguf
from resq_kernels.testing.tiny_models import make_model, make_tokenizer

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
BLOCK = 64


def same(a: Path, b: Path, names: tuple[str, ...] = (WEIGHTS, CONFIG)) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def folder(path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model, in a folder of the name that sources get here too."""
    save(tiny_llama().to(dtype), path)
    (path / "LICENSE").write_text("a licence")
    (path / CARD).write_text("---\nlicense: mit\n---\n")
    return path


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(config))


def single(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path / "pytorch_model.bin")


def legacy(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    parts = {SHARDS[0]: names[:5], SHARDS[1]: names[5:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def pickled(
    source: Path, path: Path, write: Callable[[Path, dict[str, torch.Tensor]], None] = single
) -> Path:
    shutil.copytree(source, path)
    write(path, load_file(source / WEIGHTS))
    (path / WEIGHTS).unlink()
    return path


def fp8(source: Path, path: Path) -> Path:
    """Makes `source` the model whose linears are FP8 numbers times scales of blocks, and `path` the
    folder that stores these."""
    tensors = load_file(source / WEIGHTS)
    stored, expected = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj" in name:
            rows, columns = weight.shape
            blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            each = torch.kron(scales, torch.ones(BLOCK, BLOCK))
            stored[name] = (weight.float() / each).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            expected[name] = (stored[name].float() * each).to(weight.dtype)
    shutil.copytree(source, path)
    save_file(expected, source / WEIGHTS, metadata={"format": "pt"})
    save_file(stored, path / WEIGHTS, metadata={"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    quantized |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    edit(path, quantization_config=quantized)
    return path


def gguf_file(source: Path, path: Path, kind: str, model_type: str = "llama") -> Path:
    """Makes `source` the folder of what a GGUF file stores, and `path` the file."""
    pytest.importorskip("gguf")
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    model = make_model(model_type, max_position_embeddings=POSITIONS)
    write_gguf(path, model, kind)
    model.load_state_dict(stored_weights(model, kind))
    model.to(dtype).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    return path
