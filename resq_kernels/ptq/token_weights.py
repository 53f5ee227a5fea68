"""How much the errors of each token matter to the others: attention sinks are not like them.

In most models one token of a window, usually the first, receives most of the attention (arXiv
2309.17453). An error of its value reaches every token; a plain sum over tokens counts it once.
"""

from __future__ import annotations

import torch

QUERY_STRIDE = 8
"""Every eighth query is looked at: a sink is one for most of them."""


def looked_at(seqlen: int, device: torch.device) -> torch.Tensor:
    """The positions of a window whose queries are looked at, the last one first."""
    return torch.arange(seqlen - 1, -1, -QUERY_STRIDE, device=device)


def attention_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Weights of the tokens in a sum of squared errors of attention's input, of mean 1 in a window.

    Formula: 1 + s_t, over its mean, s_t = sum over queries q of a_qt^2, mean over heads, a the
    attention. An error of the value of token t adds a_qt^2 of its power to the output at q; an
    error of its query reaches its own output alone.

    Args:
        queries: float32 [windows, heads, looked, head_dim] after RoPE, of the tokens `looked_at`.
        keys: float32 [windows, kv_heads, seqlen, head_dim] after RoPE.

    Returns:
        float32 [windows, seqlen].
    """
    seqlen, head_dim = keys.shape[-2:]
    groups = queries.shape[1] // keys.shape[1]
    looked = looked_at(seqlen, keys.device)
    later = torch.arange(seqlen, device=keys.device) > looked[:, None]
    mask = torch.zeros(later.shape, device=keys.device).masked_fill_(later, -torch.inf)
    mask = mask.expand(len(keys), -1, -1)
    received = torch.zeros(len(keys), seqlen, device=keys.device)
    for head in range(queries.shape[1]):  # one at a time: a score for every pair of tokens
        key = keys[:, head // groups].mT
        scores = torch.baddbmm(mask, queries[:, head], key, alpha=head_dim**-0.5)
        received += scores.softmax(-1).square_().sum(1)
    weights = 1 + received * (seqlen / len(looked) / queries.shape[1])
    return weights / weights.mean(-1, keepdim=True)
