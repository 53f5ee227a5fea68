"""Bytes of each part of a checkpoint, read from the headers of its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from resq_kernels.commands.output import CommandError

PARTS = ("linears", "linear_scales", "embedding", "head", "key_rotations", "other")

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
_PROJECTIONS = tuple(f".{name}_proj." for name in ("q", "k", "v", "o", "gate", "up", "down"))


def part_sizes(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint by part.

    Returns:
        linears (weights of the decoder's projections, quantized or not, without biases),
        linear_scales (their scales, 0 at 16 bits), embedding, head (0 when tied), key_rotations,
        other (norms, biases) and total, the sum.

    Raises:
        CommandError: the folder holds no safetensors file, or one is damaged.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    entry = tensors.get_slice(name)
                    count = _BYTES[entry.get_dtype()]
                    for length in entry.get_shape():
                        count *= length
                    sizes[part_of(name)] += count
        except (SafetensorError, OSError) as error:
            raise CommandError(f"{path}: damaged or truncated ({error})") from error
    return {**sizes, "total": sum(sizes.values())}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of the index, or the single file.

    Raises:
        CommandError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CommandError(f"{folder}: the index names {missing[0]}, which is missing")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CommandError(f"{folder}: no model.safetensors (other weight formats are not read)")
    return [single]


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name (docs/formats.md, section 6)."""
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if name.endswith(".weight_scale"):
        return "linear_scales"
    if any(projection in name for projection in _PROJECTIONS):
        return "other" if name.endswith(".bias") else "linears"
    return "key_rotations" if name.endswith(".key_rotation") else "other"
