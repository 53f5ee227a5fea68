"""Joins the pieces of the work folder into a Hugging Face folder that appears whole."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from resq_kernels import architecture
from resq_kernels.architecture import layer_prefix
from resq_kernels.checkpoint import quantization_config, validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.basis import Basis
from resq_kernels.ptq.embedding import embedding_tensors, head_tensors, tied_head
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace, distilled_piece, layer_piece
from resq_kernels.safetensors_io import (
    CheckpointError,
    ShardWriter,
    dtype_name,
    tensors_hash,
    write_json,
)

# Everything that makes a folder usable besides its weights and config.json: what transformers
# reads for its tokenizers, chat templates, processors and generation, and the licence. The model
# card (README.md, `write_card`) is another, and Python files would not be run.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "tekken.json",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_*.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "audio_tokenizer_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "COPYRIGHT*",
    "NOTICE*",
    "USE_POLICY*",
    "ACCEPTABLE_USE*",
)
# Weights and code, whatever they are called.
_NEVER = (
    *(".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".safetensors"),
    *(".index.json", ".py"),
)


def companion_patterns() -> tuple[list[str], list[str]]:
    """The files of `companions` as `huggingface_hub.snapshot_download` takes them.

    Returns:
        `allow_patterns` and `ignore_patterns`; upper and lower case are the same.
    """

    def any_case(pattern: str) -> str:
        return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)

    allowed = [any_case(pattern) for pattern in COPIED]
    return allowed, ["original/*", *(any_case(f"*{suffix}") for suffix in _NEVER)]


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that are copied beside its weights, in order.

    Raises:
        CheckpointError: one is a link to nothing.
    """
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]

    def wanted(path: Path) -> bool:
        name = path.relative_to(folder).as_posix().lower()
        return (
            not path.name.startswith(".")
            and not name.endswith(_NEVER)
            and any(fnmatchcase(name, pattern.lower()) for pattern in COPIED)
            and (path.is_file() or (path.is_symlink() and not path.exists()))
        )

    paths = sorted(filter(wanted, found))
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: expected a file, got a link to nothing")
    return paths


def save(
    model: SourceModel,
    basis: Basis | None,
    rotation: Rotation | None,
    config: ResQConfig,
    work: Workspace,
) -> Path:
    """Writes the folder of docs/formats.md section 6 inside the work folder, and checks it.

    Returns:
        The folder, still under the work folder, complete but for its model card.
    """
    folder = work.root / "output"
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted attempt
    folder.mkdir()
    writer = ShardWriter(folder)
    norm = model.reader.load(architecture.FINAL_NORM)
    writer.add_all(embedding_tensors(model, rotation, config))
    for index in range(model.shape.layers):
        tensors = work.load(layer_piece(index))
        if config.distill_epochs:
            tensors |= work.load(distilled_piece(index))
        writer.add_all(tensors)
    writer.add(architecture.FINAL_NORM, norm if rotation is None else torch.ones_like(norm))
    writer.add_all(head_tensors(model, rotation, config))
    rotations: list[torch.Tensor] = []
    if rotation is not None:
        rotations += [*rotation.keys[:, None], rotation.hidden.half()]
        writer.add(architecture.BASIS_ROTATION, rotations[-1])
        writer.add(architecture.BASIS_GAIN, norm)
        writer.add_all(linear_bases(model, rotation))
    writer.add(architecture.GUARD, torch.empty(0, dtype=torch.uint8))
    writer.finish()
    settings = dict(model.reader.config)
    settings["tie_word_embeddings"] = False
    settings["dtype"] = dtype_name(model.dtype)
    if model.shape.model_type == "mistral":
        # It hides no token (`architecture`), and transformers would make a mask and a cache for it.
        settings["sliding_window"] = None
    for key in ("torch_dtype", "transformers_weights"):  # said by dtype; a file of the source
        settings.pop(key, None)
    settings["quantization_config"] = quantization_config(
        config,
        basis_hash=tensors_hash(() if basis is None else basis.matrices()),
        rotation_hash=tensors_hash(rotations),
        tied_head=tied_head(model, config),
    )
    for path in companions(model.reader.folder):
        target = folder / path.relative_to(model.reader.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    write_json(folder / "config.json", settings)
    validate(folder)
    return folder


def linear_bases(model: SourceModel, rotation: Rotation) -> dict[str, torch.Tensor]:
    """What the bases of the linears take besides U_A (docs/formats.md section 6), by name."""
    gains = [
        model.reader.load(f"{layer_prefix(index)}{norm}.weight")
        for index in range(model.shape.layers)
        for norm in architecture.NORMS
    ]
    tensors = {
        "norm_gains": torch.stack(gains).unflatten(0, (-1, len(architecture.NORMS))),
        "key_factors": rotation.key_factors,
        "values": rotation.values,
        "intermediate_factors": rotation.intermediate_factors,
        "intermediate_order": rotation.intermediate_order,
    }
    return {f"{architecture.BASIS_LINEARS}.{name}": t.float() for name, t in tensors.items()}


def publish(folder: Path, out: Path, work: Workspace) -> None:
    """Renames the complete folder to `out` and removes the work folder."""
    os.replace(folder, out)
    work.remove()
