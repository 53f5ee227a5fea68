"""Multiplies the rotations into a layer's weights; the model still computes the same function."""

from __future__ import annotations

import torch

from resq_kernels import hadamard
from resq_kernels.architecture import (
    DOWN_PROJ,
    GATE_UP,
    K_PROJ,
    NORMS,
    O_PROJ,
    Q_PROJ,
    QKV,
    UP_PROJ,
    V_PROJ,
    ModelShape,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import split_columns
from resq_kernels.ptq.decoder import Layer
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel


def o_column_order(shape: ModelShape, high_fraction: float) -> torch.Tensor:
    """o_proj's columns: the low dims of every head, then the high dims of every head."""
    low = split_columns(shape.head_dim, high_fraction)[0]
    columns = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
    return torch.cat([columns[:, :low].flatten(), columns[:, low:].flatten()])


def fuse_layer(
    model: SourceModel,
    index: int,
    rotation: Rotation | None,
    config: ResQConfig,
    device: str = "cpu",
) -> Layer:
    """A decoder layer of the model in its basis, float32; products are computed in float64.

    Formula, with U_A, U_B (of the kv head), H, the norms' gains g, key factors k (of the pair) and
    intermediate factors f: q: diag(1/k) W diag(g) U_A; k: diag(k) W diag(g) U_A;
    v: U_B^T W diag(g) U_A;
    gate: W diag(g) U_A; up: diag(f) W diag(g) U_A; o: U_A^T W U_B^-T per head, then columns
    low | high; down: U_A^T W diag(1/f), then columns low | high, those of the low part times H^T.
    The rows of gate and up stand in the order of down's columns, `Rotation.intermediate_order`.
    Biases change as the rows of their weights: those of o and down become U_A^T b. Norms of
    queries and keys stay; k is 1 where they are (`Basis.key_factors`).

    Method "quik", whose U_A only permutes, has no H, and keeps the gains: they become g U_A, and
    diag(g) above is left out.

    Args:
        model: the source.
        index: which layer.
        rotation: the matrices, or None for method "rtn", which keeps the gains and rotates nothing.
        config: `high_fraction` and `hadamard_block` decide how columns are split.
        device: where the products are computed and the layer stays.
    """
    folds = rotation is not None and config.rotates
    layer = model.layer(index, folds).to(device)
    if rotation is None:
        return layer
    shape = model.shape
    u_a, u_b = rotation.hidden.to(device), rotation.values[index].to(device)
    group = shape.heads // shape.kv_heads
    inverse = rotation.values_inverse[index].to(device).repeat_interleave(group, dim=0)
    key_rows = rotation.key_factors[index].to(device).repeat(1, 2)
    intermediate = rotation.intermediate_factors[index].to(device)

    weights = {name: weight.double() for name, weight in layer.weights.items()}
    biases = {name: bias.double()[:, None] for name, bias in layer.biases.items()}
    for rows in (weights, biases):
        if V_PROJ in rows:
            rows[Q_PROJ] = rows[Q_PROJ] / key_rows.repeat_interleave(group, dim=0).view(-1, 1)
            rows[K_PROJ] = rows[K_PROJ] * key_rows.view(-1, 1)
            heads = rows[V_PROJ].unflatten(0, (shape.kv_heads, shape.head_dim))
            rows[V_PROJ] = (u_b.mT @ heads).flatten(0, 1)
        if UP_PROJ in rows:
            rows[UP_PROJ] = rows[UP_PROJ] * intermediate[:, None]
    for name in (*QKV, *GATE_UP):
        weights[name] = weights[name] @ u_a
    order = o_column_order(shape, config.high_fraction).to(device)
    o_heads = weights[O_PROJ].unflatten(1, (shape.heads, shape.head_dim)).transpose(0, 1)
    weights[O_PROJ] = u_a.T @ (o_heads @ inverse.mT).transpose(0, 1).flatten(1)[:, order]
    channels = rotation.intermediate_order[index].to(device)
    for name in biases.keys() & {O_PROJ, DOWN_PROJ}:
        biases[name] = u_a.T @ biases[name]
    for rows in (weights, biases):
        for name in rows.keys() & set(GATE_UP):
            rows[name] = rows[name][channels]
    down = (u_a.T @ (weights[DOWN_PROJ] / intermediate))[:, channels]
    block, down_high = shape.hadamard_block(config), shape.k_hi(DOWN_PROJ, config)
    if config.rotates:
        down = hadamard.transform_low(down, down_high, block)
    weights[DOWN_PROJ] = down
    for name in layer.norms.keys() & set(NORMS):
        layer.norms[name] = (layer.norms[name].double() @ u_a).float()
    return Layer(
        weights={name: weight.float() for name, weight in weights.items()},
        biases={name: bias.flatten().float() for name, bias in biases.items()},
        norms=layer.norms,
        key_rotation=rotation.keys[index][None].to(device),
        o_order=order,
        hadamard=config.rotates,
        hadamard_block=block,
        down_high=down_high,
        turned=layer.turned,
    )
