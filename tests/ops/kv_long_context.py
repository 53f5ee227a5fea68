"""A context of 128k tokens, where the errors of single tokens average out and a bias does not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from kv_cases import Pages, fill_pages

LENGTH = 131072
# Weights that differ by 0.1 % from token to token, and those of an untrained model.
FLAT, USUAL = 1e-4, None


@functools.cache
def context(head_dim: int) -> tuple[Pages, list[torch.Tensor], list[torch.Tensor]]:
    """One head's tokens in pages; k and v [LENGTH, D] before and after quantization.

    The values have mean 3: the sums are 1000 times what quantization leaves of its error in them,
    so that a bias of a part in 10^5 shows.
    """
    k, v = torch.randn(LENGTH, 1, head_dim), torch.randn(LENGTH, 1, head_dim) + 3
    pages = fill_pages([k], [v], 64)
    return pages, [x[:, 0].double() for x in (k, v)], [x[:, 0] for x in pages.rows(0)]


def error_share(
    attention: Callable[..., torch.Tensor], head_dim: int, scale: float | None
) -> float:
    """|out - exact| over |plain - exact|: the kernel's error in parts of the cache's own.

    exact is float64 attention over the dequantized pages, plain over the rows before quantization.

    Args:
        attention: `kv_attention`, on a sequence of `LENGTH` tokens of one head and one query.
        scale: factor on the scores, None for head_dim ** -0.5.
    """
    pages, before, after = context(head_dim)
    scale, q = scale or head_dim**-0.5, torch.randn(1, 1, head_dim)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    where = (pages.cache, pages.block_table, pages.seq_lens, starts, scale)
    out = attention(q, *where)[0, 0].double()
    plain, exact = ((q[0, 0].double() @ k.T * scale).softmax(0) @ v for k, v in (before, after))
    return float((out - exact).norm() / (plain - exact).norm())
