"""The bases, by variance of the activations, that split INT4 from INT8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq_kernels.architecture import DOWN_PROJ, O_PROJ, layer_prefix
from resq_kernels.ptq.balance import balancing, channel_factors
from resq_kernels.ptq.calibrate import SecondMoments
from resq_kernels.ptq.source import SourceModel


@dataclass(frozen=True)
class Basis:
    """Changes of basis whose columns stand in ascending order of variance, float64.

    The last columns of each are the subspace that is kept in INT8.

    Attributes:
        hidden: U_A's eigenvectors [hidden, hidden], orthogonal.
        values: U_B's balancing matrices [layers, kv_heads, head_dim, head_dim]; v_proj's outputs
            are multiplied by them.
        values_inverse: their inverses, multiplied into o_proj.
        keys: U_C's eigenvectors [layers, head_dim, head_dim], orthogonal.
        key_factors: [layers, kv_heads, head_dim / 2]: k_proj's rotary pairs are multiplied by
            them, q_proj's are divided by them.
        intermediate_factors: [layers, intermediate]: up_proj's rows are multiplied by them,
            down_proj's columns are divided by them.
        hidden_variances, value_variances, key_variances: the variance along each column; shapes as
            of the matrices, without the last dimension.
    """

    hidden: torch.Tensor
    values: torch.Tensor
    values_inverse: torch.Tensor
    keys: torch.Tensor
    key_factors: torch.Tensor
    intermediate_factors: torch.Tensor
    hidden_variances: torch.Tensor
    value_variances: torch.Tensor
    key_variances: torch.Tensor

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The bases in the order in which `basis_hash` reads them."""
        return self.hidden, self.values, self.keys


def find_basis(model: SourceModel, moments: SecondMoments) -> Basis:
    """Finds PCA bases of the residual stream and of keys, and balanced bases of values.

    Formula: E[x x^T] = P diag(variance) P^T for U_A and, with the keys of all kv heads after
    `key_factors`, for U_C. U_B balances E[a a^T] of attention's outputs against o_proj's columns
    (`balance.balancing`): a principal basis whose columns are scaled as well.

    Source: arXiv 2412.14363, section 4, where U_B is orthogonal and there are no factors. On the
    small Llama of examples/ with planted outliers, the divergence from the 16-bit model falls by
    16 % (RTN) and 13 % (GPTQ): docs/notes/0004-quantizer.md.
    """
    shape = model.shape
    value_grams, down_powers = [], []
    for index in range(shape.layers):
        prefix = layer_prefix(index)
        o_proj = model.load(f"{prefix}{O_PROJ}.weight").double()
        heads = o_proj.unflatten(1, (shape.kv_heads, -1, shape.head_dim))
        value_grams.append(torch.einsum("nkgi,nkgj->kij", heads, heads))
        down_powers.append(model.load(f"{prefix}{DOWN_PROJ}.weight").double().square().sum(0))
    values, values_inverse, value_variances = balancing(moments.attended, torch.stack(value_grams))
    key_factors = channel_factors(_pair_power(moments.keys), _pair_power(moments.queries))
    both = key_factors.repeat(1, 1, 2)
    keys = (both.unsqueeze(-1) * moments.keys * both.unsqueeze(-2)).sum(1)
    hidden_variances, hidden = principal_components(moments.hidden)
    key_variances, key_basis = principal_components(keys)
    return Basis(
        hidden=hidden,
        values=values,
        values_inverse=values_inverse,
        keys=key_basis,
        key_factors=key_factors,
        intermediate_factors=channel_factors(moments.intermediate, torch.stack(down_powers)),
        hidden_variances=hidden_variances,
        value_variances=value_variances,
        key_variances=key_variances,
    )


def principal_components(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, ascending, and eigenvectors as columns, of [..., K, K].

    The component of largest magnitude of every column is positive, which makes the matrix unique
    where variances differ.
    """
    variances, vectors = torch.linalg.eigh(moment)
    largest = vectors.abs().argmax(-2, keepdim=True)
    sign = torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0)
    return variances.clamp_min(0), vectors * sign


def _pair_power(moment: torch.Tensor) -> torch.Tensor:
    """[..., head_dim, head_dim] -> mean squares of the rotary pairs (i, i + head_dim / 2)."""
    return moment.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2)
