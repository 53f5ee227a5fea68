"""Bytes of each part of a checkpoint, read from the headers of its safetensors files."""

from __future__ import annotations

from pathlib import Path

from resq_kernels.safetensors_io import CheckpointReader

PARTS = ("linears", "linear_scales", "embedding", "head", "rotations", "other")

_PROJECTIONS = tuple(f".{name}_proj." for name in ("q", "k", "v", "o", "gate", "up", "down"))


def part_sizes(folder: Path) -> dict[str, int]:
    """Bytes of a checkpoint by part, of the files that transformers loads.

    Returns:
        linears (weights of the decoder's projections, quantized or not, without biases),
        linear_scales (their scales, 0 at 16 bits), embedding, head (0 when tied), rotations
        (of keys, and of hidden states for callers), other (norms, biases) and total, the sum.

    Raises:
        CheckpointError: the folder holds no safetensors files, or one is missing or damaged.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, info in CheckpointReader(folder).tensors.items():
        sizes[part_of(name)] += info.bytes
    return {**sizes, "total": sum(sizes.values())}


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name (docs/formats.md, section 6)."""
    if name.endswith((".key_rotation", ".basis.rotation")) or ".basis.linears." in name:
        return "rotations"
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if name.endswith(".weight_scale"):
        return "linear_scales"
    if any(projection in name for projection in _PROJECTIONS):
        return "other" if name.endswith(".bias") else "linears"
    return "other"
