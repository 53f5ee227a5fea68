"""The amplitudes of channels, by which method "quik" orders them: the largest go to INT8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from resq_kernels.architecture import ModelShape
from resq_kernels.ptq.calibrate import Inputs, Measured, check_finite, measure_layers
from resq_kernels.ptq.decoder import Rope
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace


@dataclass(frozen=True)
class Amplitudes:
    """The largest magnitudes of the float model's channels over the calibration tokens, float32.

    Attributes:
        hidden: [layers, 2, hidden]: inputs of q, k, v and of gate, up, gains of norms included.
        attended: [layers, kv_heads, head_dim]: o_proj's inputs, over the query heads of a kv head.
        keys: [layers, head_dim]: keys after RoPE, over the kv heads.
        intermediate: [layers, intermediate]: down_proj's inputs.
    """

    hidden: torch.Tensor
    attended: torch.Tensor
    keys: torch.Tensor
    intermediate: torch.Tensor


def measure_amplitudes(
    model: SourceModel,
    tokens: torch.Tensor,
    rope: Rope,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
    keep_states: bool = False,
) -> Amplitudes:
    """Runs the float model over the windows and keeps the largest magnitudes (`measure_layers`).

    Args:
        model: the source.
        tokens: calibration windows, int64 [windows, seqlen].
        rope: tables of `rope_tables`.
        work: the work folder.
        device: where the layers are computed.
        progress: bars on stderr.
        keep_states: whether the states after the last layer stay in the work folder.

    Raises:
        ValueError: a weight or an amplitude is not finite.
    """

    def keep(index: int, amplitudes: Measured) -> None:
        check_finite(index, amplitudes, "amplitude")
        work.save(f"amplitudes-{index:05d}", amplitudes)

    amplitudes = measure_layers(
        model,
        tokens,
        rope,
        work,
        "amplitudes",
        lambda batches: _largest(batches, model.shape),
        keep,
        fold_norms=False,
        device=device,
        progress=progress,
        keep_states=keep_states,
    )
    return Amplitudes(**amplitudes)


def permutations(amplitudes: Amplitudes, shape: ModelShape) -> Rotation:
    """The permutations that put channels in ascending order of amplitude.

    Formula: U = P with P_ij = 1 where channel i is the j-th, for U_A (one for the whole model, by
    a / mean(a) averaged over the amplitudes a of all its inputs, whose gains differ by factors of
    ten), U_B (of each kv head) and U_C (of each layer); all factors are 1. Whatever share of the
    columns is kept in INT8, it is the last ones, the largest.

    Args:
        amplitudes: those of `measure_amplitudes`.
        shape: sizes of the model.

    Source: QUIK, arXiv 2310.09259: outliers by the largest magnitude on calibration
    data, moved to the end of the columns. There every linear has an order of its own; here those
    that read the residual stream share one, as they share U_A.
    """
    hidden, values = amplitudes.hidden.double(), _permutation(amplitudes.attended)
    means = hidden.mean(-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)
    return Rotation(
        hidden=_permutation((hidden / means).mean((0, 1))),
        values=values,
        values_inverse=values.mT.contiguous(),
        keys=_permutation(amplitudes.keys).half(),
        key_factors=torch.ones(*values.shape[:2], shape.head_dim // 2, dtype=torch.float64),
        intermediate_factors=torch.ones_like(amplitudes.intermediate, dtype=torch.float64),
        intermediate_order=amplitudes.intermediate.argsort(dim=-1, stable=True),
    )


def _permutation(amplitudes: torch.Tensor) -> torch.Tensor:
    """[..., K] -> P, float64 [..., K, K]: x P has the columns of x in ascending order."""
    order = amplitudes.argsort(dim=-1, stable=True)
    return functional.one_hot(order).mT.double().contiguous()


def _largest(batches: Iterable[Inputs], shape: ModelShape) -> Measured:
    """The amplitudes of one layer."""
    found: Measured = {}
    for x in batches:
        both = torch.stack([x.qkv, x.gate_up], dim=-2)
        heads = x.attended.unflatten(-1, (shape.kv_heads, -1, shape.head_dim))
        batch = {
            "hidden": both.abs().amax((0, 1)),
            "attended": heads.abs().amax((0, 1, 3)),
            "keys": x.keys.abs().amax((0, 1, 2)),
            "intermediate": x.down.abs().amax((0, 1)),
        }
        found = {name: torch.maximum(found.get(name, new), new) for name, new in batch.items()}
    return {name: largest.cpu() for name, largest in found.items()}
