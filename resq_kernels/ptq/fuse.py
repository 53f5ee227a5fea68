"""Multiplies the rotations into the weights: the model computes the same function."""

from __future__ import annotations

import torch

from resq_kernels import architecture, hadamard
from resq_kernels.architecture import DOWN_PROJ, GATE_UP, O_PROJ, QKV, ModelShape
from resq_kernels.formats import split_columns
from resq_kernels.ptq.decoder import Layer
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel

VOCAB_ROWS = 8192
"""Rows of the embedding or head that are rotated in float64 at once."""


def o_column_order(shape: ModelShape, high_fraction: float) -> torch.Tensor:
    """o_proj's columns: the low dims of every head, then the high dims of every head."""
    low = split_columns(shape.head_dim, high_fraction)[0]
    columns = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
    return torch.cat([columns[:, :low].flatten(), columns[:, low:].flatten()])


def fuse_layer(
    model: SourceModel, index: int, rotation: Rotation | None, high_fraction: float
) -> Layer:
    """A decoder layer of the rotated model, float32; products are computed in float64.

    Formula, with U_A, U_B (of the kv head), H and the norms' gains g:
    q, k: W diag(g) U_A; v: U_B^T W diag(g) U_A, bias b U_B; gate, up: W diag(g) U_A;
    o: U_A^T W U_B per head, then columns low | high; down: U_A^T W H^T.

    Args:
        model: the source.
        index: which layer.
        rotation: the matrices, or None for method "rtn", which keeps the gains and rotates nothing.
        high_fraction: decides o_proj's column order.
    """
    layer = model.layer(index, fold_norms=rotation is not None)
    if rotation is None:
        return layer
    shape = model.shape
    u_a, u_b = rotation.hidden, rotation.values[index]
    weights = {name: weight.double() for name, weight in layer.weights.items()}
    for name in (*QKV, *GATE_UP):
        weights[name] = weights[name] @ u_a
    value_heads = weights[QKV[2]].unflatten(0, (shape.kv_heads, shape.head_dim))
    weights[QKV[2]] = (u_b.mT @ value_heads).flatten(0, 1)
    if QKV[2] in layer.biases:
        bias_heads = layer.biases[QKV[2]].double().unflatten(0, (shape.kv_heads, 1, -1))
        layer.biases[QKV[2]] = (bias_heads @ u_b).flatten().float()
    per_head = u_b.repeat_interleave(shape.heads // shape.kv_heads, dim=0)
    o_heads = weights[O_PROJ].unflatten(1, (shape.heads, shape.head_dim)).transpose(0, 1)
    order = o_column_order(shape, high_fraction)
    weights[O_PROJ] = u_a.T @ (o_heads @ per_head).transpose(0, 1).flatten(1)[:, order]
    weights[DOWN_PROJ] = hadamard.transform(u_a.T @ weights[DOWN_PROJ])
    return Layer(
        {name: weight.float() for name, weight in weights.items()},
        layer.biases,
        {},
        rotation.keys[index][None],
        order,
        True,
    )


def fuse_embedding(model: SourceModel, rotation: Rotation | None) -> torch.Tensor:
    """The embedding E U_A in its source dtype."""
    return _rotate_rows(model, architecture.EMBEDDING, None, rotation)


def fuse_head(model: SourceModel, rotation: Rotation | None) -> torch.Tensor:
    """The head W diag(g) U_A in its source dtype, g the gain of the final norm."""
    gain = model.load(architecture.FINAL_NORM).double() if rotation is not None else None
    return _rotate_rows(model, model.head, gain, rotation)


def _rotate_rows(
    model: SourceModel, name: str, gain: torch.Tensor | None, rotation: Rotation | None
) -> torch.Tensor:
    matrix = model.reader.load(name)
    for start in range(0, len(matrix), VOCAB_ROWS):
        rows = matrix[start : start + VOCAB_ROWS].double()
        if not torch.isfinite(rows).all():
            raise ValueError(f"{model.reader.folder}: {name}: expected finite values, got others")
        if gain is not None:
            rows = rows * gain
        if rotation is not None:
            matrix[start : start + VOCAB_ROWS] = (rows @ rotation.hidden).to(matrix.dtype)
    return matrix
