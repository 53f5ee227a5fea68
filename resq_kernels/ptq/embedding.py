"""Embedding and head of the rotated model, in 8 bits or in the source's 16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from resq_kernels.architecture import (
    EMBEDDING,
    EMBEDDING_MODULE,
    FINAL_NORM,
    HEAD_GAIN,
    HEAD_MODULE,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import QuantizedWeight
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import HiddenStates, Workspace
from resq_kernels.weights import round_weight

VOCAB_ROWS = 8192
"""Rows of a matrix that are rotated in float64, and rounded, at once."""


def embed(
    model: SourceModel, rotation: Rotation | None, tokens: torch.Tensor, config: ResQConfig
) -> torch.Tensor:
    """The output of the quantized model's embedding: int64 [...] -> float32 [..., hidden]."""
    ids, places = tokens.unique(return_inverse=True)
    rows = _rotated(model, EMBEDDING, model.reader.load(EMBEDDING)[ids], None, rotation)
    if config.embedding_bits == 8:
        parts = [_round(part).dequantize() for part in rows]
    else:
        dtype = model.reader.info(EMBEDDING).dtype
        parts = [part.to(dtype).float() for part in rows]
    return torch.cat(parts)[places]


def embedded(
    model: SourceModel,
    rotation: Rotation | None,
    tokens: torch.Tensor,
    config: ResQConfig,
    work: Workspace,
) -> HiddenStates:
    """`embed` of all calibration windows, in the work folder: what the first layer reads."""
    states = work.hidden("rounded-00000", (*tokens.shape, model.shape.hidden))
    if not states.exists:
        states.begin().copy_(embed(model, rotation, tokens, config))
        states.finish()
    return states


def embedding_tensors(
    model: SourceModel, rotation: Rotation | None, config: ResQConfig
) -> dict[str, torch.Tensor]:
    """The embedding E U_A under its names in a checkpoint (docs/formats.md section 6)."""
    return _tensors(model, EMBEDDING, None, rotation, config, EMBEDDING_MODULE)


def head_tensors(
    model: SourceModel, rotation: Rotation | None, config: ResQConfig
) -> dict[str, torch.Tensor]:
    """The head under its names in a checkpoint, g the gain of the final norm.

    Formula: W diag(g) U_A; for a head tied to an embedding in 8 bits, G = U_A^T diag(g) U_A,
    which turns E U_A into the head (`nn.embedding.TiedHead`). Without a rotation the norm keeps g,
    and the head is W, or nothing if it is tied.
    """
    gain = None if rotation is None else model.load(FINAL_NORM).double()
    if not tied_head(model, config):
        return _tensors(model, model.head, gain, rotation, config, HEAD_MODULE)
    if rotation is None or gain is None:
        return {}
    turn = rotation.hidden.mT @ (gain[:, None] * rotation.hidden)
    return {HEAD_GAIN: turn.to(model.reader.info(EMBEDDING).dtype)}


def tied_head(model: SourceModel, config: ResQConfig) -> bool:
    """Whether the quantized model's head reads the embedding's matrix."""
    return model.shape.tied and config.embedding_bits == 8


def _tensors(
    model: SourceModel,
    name: str,
    gain: torch.Tensor | None,
    rotation: Rotation | None,
    config: ResQConfig,
    module: str,
) -> dict[str, torch.Tensor]:
    matrix = model.reader.load(name)
    rows = _rotated(model, name, matrix, gain, rotation)
    if config.embedding_bits == 16:
        for start, part in zip(range(0, len(matrix), VOCAB_ROWS), rows, strict=True):
            matrix[start : start + VOCAB_ROWS] = part.to(matrix.dtype)
        return {f"{module}.weight": matrix}
    return QuantizedWeight.cat([_round(part) for part in rows]).named(module)


def _round(rows: torch.Tensor) -> QuantizedWeight:
    """Rounds rows to INT8 over their whole range.

    A search for a smaller range (`ops.search_scale`) finds 0.99 of it for Gaussian rows, 2 % of the
    noise's power.
    """
    rows = rows.float()
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    codes = round_weight(rows, scale, 8)
    none = torch.empty(len(rows), 0, dtype=torch.uint8)
    return QuantizedWeight(none, codes, torch.stack([torch.zeros_like(scale), scale], dim=1))


def _rotated(
    model: SourceModel,
    name: str,
    matrix: torch.Tensor,
    gain: torch.Tensor | None,
    rotation: Rotation | None,
) -> Iterator[torch.Tensor]:
    """matrix diag(gain) U_A in float64, `VOCAB_ROWS` rows at a time."""
    for rows in matrix.split(VOCAB_ROWS):
        model.check_finite(name, rows)
        part = rows.double() if gain is None else rows.double() * gain
        yield part if rotation is None else part @ rotation.hidden
