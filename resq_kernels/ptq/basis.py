"""The bases, by variance of the activations, that split INT4 from INT8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq_kernels.architecture import DOWN_PROJ, O_PROJ, layer_prefix
from resq_kernels.formats import split_columns
from resq_kernels.ptq.balance import FLOOR, balancing, channel_factors
from resq_kernels.ptq.calibrate import SecondMoments
from resq_kernels.ptq.source import SourceModel

CACHE_HIGH_FRACTION = 0.125
"""Share of head_dim that the KV cache keeps in INT8 (docs/formats.md section 5)."""
JOINT_STEPS = 10
"""Of `joint_components`; keys and queries of a trained model need two."""


@dataclass(frozen=True)
class Basis:
    """Changes of basis whose columns stand in ascending order of what they carry, float64.

    The last columns of each are the subspace that is kept in INT8.

    Attributes:
        hidden: U_A's eigenvectors [hidden, hidden], orthogonal.
        values: U_B's matrices [layers, kv_heads, head_dim, head_dim], balancing or orthogonal;
            v_proj's outputs are multiplied by them.
        values_inverse: their inverses, multiplied into o_proj.
        keys: U_C's components [layers, head_dim, head_dim], orthogonal.
        key_factors: [layers, kv_heads, head_dim / 2]: k_proj's rotary pairs are multiplied by
            them, q_proj's are divided by them; ones where norms follow both.
        intermediate_factors: [layers, intermediate]: up_proj's rows are multiplied by them,
            down_proj's columns are divided by them.
        intermediate_power: [layers, intermediate]: what the channels carry at down_proj's output,
            the mean square of each times the power of its column, which no factor changes.
        hidden_variances, value_variances, key_variances: the variance along each column; shapes as
            of the matrices, without the last dimension.
    """

    hidden: torch.Tensor
    values: torch.Tensor
    values_inverse: torch.Tensor
    keys: torch.Tensor
    key_factors: torch.Tensor
    intermediate_factors: torch.Tensor
    intermediate_power: torch.Tensor
    hidden_variances: torch.Tensor
    value_variances: torch.Tensor
    key_variances: torch.Tensor

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The bases in the order in which `basis_hash` reads them."""
        return self.hidden, self.values, self.keys


def find_basis(model: SourceModel, moments: SecondMoments, bases: str = "balanced") -> Basis:
    """Finds a PCA basis of the residual stream, and bases of keys and of values.

    Formula: E[x x^T] = P diag(variance) P^T for U_A.

    "balanced": U_C splits keys and queries, sums over all kv heads after `key_factors`, so that the
    noise of the keys' INT4 part is smallest in the scores (`joint_components`). U_B balances
    E[a a^T] of attention's outputs against o_proj's columns (`balance.balancing`): a principal
    basis whose columns are scaled as well. "principal": U_C is the PCA of the keys, summed over the
    kv heads, U_B that of each kv head's values, and all factors are 1.

    Args:
        model: the source.
        moments: those of `calibrate`.
        bases: as in `ResQConfig`.

    Source: "principal" is arXiv 2412.14363, section 4. U_C: docs/notes/0035-tokens-that-matter.md.
    U_B and the factors: on the small Llama of examples/ with planted outliers, the divergence from
    the 16-bit model falls by 16 % (RTN) and 13 % (GPTQ), docs/notes/0004-quantizer.md.
    """
    shape = model.shape
    down = (model.load(f"{layer_prefix(i)}{DOWN_PROJ}.weight") for i in range(shape.layers))
    columns = torch.stack([weight.double().square().sum(0) for weight in down])
    key_powers, query_powers = _pair_power(moments.keys), _pair_power(moments.queries)
    hidden_variances, hidden = principal_components(moments.hidden)
    if bases == "principal":
        value_variances, values = principal_components(moments.values)
        values_inverse = values.mT.contiguous()
        key_factors = torch.ones_like(key_powers)
        intermediate_factors = torch.ones_like(columns)
        keys = moments.keys.sum(1)
        key_basis = principal_components(keys)[1]
    else:
        grams = _value_grams(model)
        values, values_inverse, value_variances = balancing(moments.attended, grams)
        if shape.head_norms:
            # A norm undoes factors of rows, and factors in its gain brought nothing (notes/0052).
            key_factors = torch.ones_like(key_powers)
        else:
            key_factors = channel_factors(key_powers, query_powers)
        intermediate_factors = channel_factors(moments.intermediate, columns)
        both = key_factors.repeat(1, 1, 2)
        keys = (both.unsqueeze(-1) * moments.keys * both.unsqueeze(-2)).sum(1)
        queries = (moments.queries / both.unsqueeze(-1) / both.unsqueeze(-2)).sum(1)
        low = split_columns(shape.head_dim, CACHE_HIGH_FRACTION)[0]
        key_basis = joint_components(keys, queries, low)
    return Basis(
        hidden=hidden,
        values=values,
        values_inverse=values_inverse,
        keys=key_basis,
        key_factors=key_factors,
        intermediate_factors=intermediate_factors,
        intermediate_power=moments.intermediate * columns,
        hidden_variances=hidden_variances,
        value_variances=value_variances,
        key_variances=((keys @ key_basis) * key_basis).sum(-2).clamp_min(0),
    )


def principal_components(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, ascending, and eigenvectors as columns, of [..., K, K].

    The component of largest magnitude of every column is positive, which makes the matrix unique
    where variances differ.
    """
    variances, vectors = torch.linalg.eigh(moment)
    return variances.clamp_min(0), _with_signs(vectors)


def joint_components(keys: torch.Tensor, queries: torch.Tensor, low: int) -> torch.Tensor:
    """The orthogonal U [..., D, D] whose first `low` columns carry little of keys and of queries.

    Keys that are rounded in these columns get noise in proportion to tr(L^T K L), L being the
    columns, and the noise of the scores is that times tr(L^T Q L) / low. Their product is
    minimised.

    Formula: U = eigenvectors, ascending, of K / tr(L^T K L) + Q / tr(L^T Q L), again and again; no
    step raises the product, since its logarithm is concave in the traces. To each trace `FLOOR` of
    the whole moment's is added: there may be fewer tokens than dims.

    Args:
        keys, queries: second moments K and Q, float64 [..., D, D].
        low: columns of the INT4 part.
    """
    both = torch.stack([keys, queries])
    traces = both.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = FLOOR * traces + torch.finfo(both.dtype).tiny
    for _ in range(JOINT_STEPS):
        weighted = (both / (traces + floor)[..., None, None]).sum(0)
        vectors = torch.linalg.eigh(weighted)[1]
        part = vectors[..., :low]
        traces = ((both @ part) * part).sum((-2, -1))
    return _with_signs(vectors)


def _value_grams(model: SourceModel) -> torch.Tensor:
    """W^T W of o_proj's columns that read a kv head: [layers, kv_heads, head_dim, head_dim]."""
    shape, grams = model.shape, []
    for index in range(shape.layers):
        o_proj = model.load(f"{layer_prefix(index)}{O_PROJ}.weight").double()
        heads = o_proj.unflatten(1, (shape.kv_heads, -1, shape.head_dim))
        grams.append(torch.einsum("nkgi,nkgj->kij", heads, heads))
    return torch.stack(grams)


def _with_signs(vectors: torch.Tensor) -> torch.Tensor:
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0)


def _pair_power(moment: torch.Tensor) -> torch.Tensor:
    """[..., head_dim, head_dim] -> mean squares of the rotary pairs (i, i + head_dim / 2)."""
    return moment.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2)
