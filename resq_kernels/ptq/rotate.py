"""The orthogonal matrices that are multiplied into the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from resq_kernels import hadamard
from resq_kernels.architecture import DOWN_PROJ, ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.formats import split_columns
from resq_kernels.ptq.basis import CACHE_HIGH_FRACTION, Basis
from resq_kernels.ptq.cayley import block_mask


@dataclass(frozen=True)
class Rotation:
    """The matrices multiplied into the weights (`fuse`); orthogonal up to the balancing of `Basis`.
    With method "quik" they are permutations (`ptq.amplitudes`).

    Attributes:
        hidden: U_A, float64 [hidden, hidden]: the residual stream x becomes x U_A.
        values, values_inverse: U_B and its inverse, float64 [layers, kv_heads, head_dim, head_dim].
        keys: U_C as stored, float16 [layers, head_dim, head_dim].
        key_factors, intermediate_factors: as in `Basis`.
        intermediate_order: int64 [layers, intermediate]: down_proj's columns, those of the INT4
            part, then those of the INT8 part, which carry most (`Basis.intermediate_power`), both
            in ascending order; with method "quik" all of them by amplitude.
    """

    hidden: torch.Tensor
    values: torch.Tensor
    values_inverse: torch.Tensor
    keys: torch.Tensor
    key_factors: torch.Tensor
    intermediate_factors: torch.Tensor
    intermediate_order: torch.Tensor


def rotate(basis: Basis | None, shape: ModelShape, config: ResQConfig) -> Rotation:
    """Draws the random rotations and multiplies them into the bases.

    Formula: U = P blockdiag(R_1, ..., R_n), each R random orthogonal: variance is spread evenly
    inside the INT4 part and inside the INT8 part, and never moves between them. Without a basis
    (method "quarot"): U = diag(random signs) H.

    Args:
        basis: the bases, or None for a method without bases.
        shape: sizes of the model.
        config: `high_fraction`, `hadamard_block` and `seed`.

    Source: arXiv 2412.14363, section 4; QuaRot, arXiv 2404.00456, for the method without basis.
    """
    head = shape.head_dim
    if basis is None:
        values = _random_hadamard(head, config.seed, "values")
        values = values.repeat(shape.layers, shape.kv_heads, 1, 1)
        keys = _random_hadamard(head, config.seed, "keys")
        return Rotation(
            hidden=_random_hadamard(shape.hidden, config.seed, "hidden"),
            values=values,
            values_inverse=values.mT.contiguous(),
            keys=keys.repeat(shape.layers, 1, 1).half(),
            key_factors=torch.ones(shape.layers, shape.kv_heads, head // 2, dtype=torch.float64),
            intermediate_factors=torch.ones(shape.layers, shape.intermediate, dtype=torch.float64),
            intermediate_order=torch.arange(shape.intermediate).repeat(shape.layers, 1),
        )
    borders = _borders(shape, config)
    hidden = _blocks(shape.hidden, borders["hidden"], config.seed, "hidden")
    values = _blocks(head, borders["values"], config.seed, "values")
    keys = _blocks(head, borders["keys"], config.seed, "keys")
    return Rotation(
        hidden=basis.hidden @ hidden,
        values=basis.values @ values,
        values_inverse=values.mT @ basis.values_inverse,
        keys=(basis.keys @ keys).half(),
        key_factors=basis.key_factors,
        intermediate_factors=basis.intermediate_factors,
        intermediate_order=_order(basis.intermediate_power, shape.k_hi(DOWN_PROJ, config)),
    )


def block_masks(shape: ModelShape, config: ResQConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a rotation of the hidden states and one of values may have entries: bool [hidden,
    hidden] and [head_dim, head_dim], blocks that no border between INT4 and INT8 crosses."""
    borders = _borders(shape, config)
    return (
        block_mask(shape.hidden, borders["hidden"]),
        block_mask(shape.head_dim, borders["values"]),
    )


def _borders(shape: ModelShape, config: ResQConfig) -> dict[str, set[int]]:
    """Where the parts of the hidden states, values and keys end; nowhere without a basis."""
    if config.method != "resq":
        return {"hidden": set(), "values": set(), "keys": set()}
    head_split = split_columns(shape.head_dim, config.high_fraction)[0]
    cache_split = split_columns(shape.head_dim, CACHE_HIGH_FRACTION)[0]
    return {
        "hidden": {split_columns(shape.hidden, config.high_fraction)[0]},
        # Values are split twice, in the cache and at o_proj; no rotation may cross either border.
        "values": {head_split, cache_split},
        "keys": {cache_split},
    }


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A matrix of the uniform distribution over orthogonal matrices, float64 [size, size].

    Formula: Q of the QR decomposition of a Gaussian matrix, columns multiplied by sign(diag R).
    """
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _order(power: torch.Tensor, k_hi: int) -> torch.Tensor:
    """The columns of each row of `power` but for its `k_hi` largest, then these."""
    by_power = power.argsort(dim=-1, stable=True)
    low, high = by_power.split([power.shape[-1] - k_hi, k_hi], dim=-1)
    return torch.cat([low.sort(dim=-1)[0], high.sort(dim=-1)[0]], dim=-1)


def _generator(seed: int, site: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _random_hadamard(size: int, seed: int, site: str) -> torch.Tensor:
    signs = torch.randint(2, (size,), generator=_generator(seed, site)) * 2 - 1
    return hadamard.matrix(size).double().T * signs.double()[:, None] * size**-0.5


def _blocks(size: int, borders: set[int], seed: int, site: str) -> torch.Tensor:
    generator = _generator(seed, site)
    edges = sorted({0, size} | borders)
    blocks = [random_orthogonal(b - a, generator) for a, b in zip(edges, edges[1:], strict=False)]
    return torch.block_diag(*blocks)
