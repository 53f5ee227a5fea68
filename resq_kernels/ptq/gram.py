"""Sums of x^T x: products of a batch in float32, sums over batches in float64."""

from __future__ import annotations

import torch

PANEL = 192
"""Columns of one product: only the upper triangle is computed, in panels of this width."""


class Gram:
    """The sum of x^T x over batches of rows x, and the number of rows.

    A batch's products are added up in float32: with `BATCH_TOKENS` rows, each element is within
    2048 * 2^-24 of sum |x_i x_j| in the worst case, and within 4e-6 on data (a test measures it).
    float64 products would take four times as long, on a GPU much longer.

    Args:
        size: columns of x.
        device: where x is.
    """

    def __init__(self, size: int, device: str) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds the rows of float32 [..., size]; with weights [...], w x^T x of each row."""
        if weights is not None:
            x = x * weights.sqrt().unsqueeze(-1)
        x = x.flatten(0, -2)
        for start in range(0, x.shape[1], PANEL):
            stop = start + PANEL
            self.total[:stop, start:stop] += x[:, :stop].T @ x[:, start:stop]
        self.rows += x.shape[0]

    def mean(self) -> torch.Tensor:
        """E[x x^T], symmetric, float64 [size, size]; nothing can be added afterwards."""
        for start in range(0, len(self.total), PANEL):
            stop = start + PANEL
            self.total[stop:, start:stop] = self.total[start:stop, stop:].T
            block = self.total[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
        return self.total.div_(self.rows)


def gram_per_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """x^T x per kv head, mean over its query heads, of float32 [windows, heads, seqlen, head_dim].

    float64 [kv_heads, head_dim, head_dim].
    """
    heads = x.transpose(0, 1).flatten(1, 2)
    grams = (heads.mT @ heads).double().unflatten(0, (kv_heads, -1)).mean(1)
    return (grams + grams.mT) / 2
