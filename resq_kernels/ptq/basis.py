"""Principal components: which directions of an activation carry its variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq_kernels.ptq.calibrate import Covariances


@dataclass(frozen=True)
class Basis:
    """Orthogonal eigenvector matrices, columns in ascending order of variance, float64.

    The last columns of each are the subspace that is kept in INT8.

    Attributes:
        hidden: U_A's P [hidden, hidden].
        values: U_B's P [layers, kv_heads, head_dim, head_dim].
        keys: U_C's P [layers, head_dim, head_dim].
        spectra: name -> eigenvalues, ascending: "hidden" [hidden], "values", "keys".
    """

    hidden: torch.Tensor
    values: torch.Tensor
    keys: torch.Tensor
    spectra: dict[str, torch.Tensor]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The matrices in the order in which `basis_hash` reads them."""
        return self.hidden, self.values, self.keys


def pca(covariances: Covariances) -> Basis:
    """Eigenvectors of the second moments.

    Formula: E[x x^T] = P diag(variance) P^T, variance ascending; the component of largest
    magnitude of every column is positive, which makes P unique where variances differ.

    Source: arXiv 2412.14363, section 4.
    """
    hidden = _eigenvectors(covariances.hidden)
    values = _eigenvectors(covariances.values)
    keys = _eigenvectors(covariances.keys)
    spectra = {"hidden": hidden[0], "values": values[0], "keys": keys[0]}
    return Basis(hidden[1], values[1], keys[1], spectra)


def _eigenvectors(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variances, vectors = torch.linalg.eigh(moment)
    largest = vectors.abs().argmax(-2, keepdim=True)
    sign = torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0)
    return variances.clamp_min(0), vectors * sign
