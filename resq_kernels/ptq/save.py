"""Joins the pieces of the work folder into a Hugging Face folder that appears whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from resq_kernels import architecture
from resq_kernels.checkpoint import quantization_config, validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.basis import Basis
from resq_kernels.ptq.embedding import embedding_tensors, head_tensors, tied_head
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace, layer_piece
from resq_kernels.safetensors_io import ShardWriter, dtype_name, tensors_hash, write_json

# Everything that makes a folder usable besides its weights.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def save(
    model: SourceModel,
    basis: Basis | None,
    rotation: Rotation | None,
    config: ResQConfig,
    work: Workspace,
) -> Path:
    """Writes the folder of docs/formats.md section 6 inside the work folder, and checks it.

    Returns:
        The complete folder, still under the work folder.
    """
    folder = work.root / "output"
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted attempt
    folder.mkdir()
    writer = ShardWriter(folder)
    norm = model.reader.load(architecture.FINAL_NORM)
    writer.add_all(embedding_tensors(model, rotation, config))
    for index in range(model.shape.layers):
        writer.add_all(work.load(layer_piece(index)))
    writer.add(architecture.FINAL_NORM, norm if rotation is None else torch.ones_like(norm))
    writer.add_all(head_tensors(model, rotation, config))
    rotations: list[torch.Tensor] = []
    if rotation is not None:
        rotations += [*rotation.keys[:, None], rotation.hidden.half()]
        writer.add(architecture.BASIS_ROTATION, rotations[-1])
        writer.add(architecture.BASIS_GAIN, norm)
    writer.add(architecture.GUARD, torch.empty(0, dtype=torch.uint8))
    writer.finish()
    settings = dict(model.reader.config)
    settings["tie_word_embeddings"] = False
    settings["dtype"] = dtype_name(model.dtype)
    for key in ("torch_dtype", "transformers_weights"):  # said by dtype; a file of the source
        settings.pop(key, None)
    settings["quantization_config"] = quantization_config(
        config,
        basis_hash=tensors_hash(() if basis is None else basis.matrices()),
        rotation_hash=tensors_hash(rotations),
        tied_head=tied_head(model, config),
    )
    for pattern in COPIED:
        for path in sorted(model.reader.folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", settings)
    validate(folder)
    return folder


def publish(folder: Path, out: Path, work: Workspace) -> None:
    """Renames the complete folder to `out` and removes the work folder."""
    os.replace(folder, out)
    work.remove()
