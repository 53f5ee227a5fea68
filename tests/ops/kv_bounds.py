"""Derived bounds on the error of attention over pages, for one sequence."""

from __future__ import annotations

import torch

from resq_kernels import kv_pages

BLOCK = 64  # keys that share a scale of the 16-bit weights


def weights_and_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax weights, scores (both [n, heads, length]) and which scores are visible.

    q: float64 [n, heads, D], the last n tokens; k: float64 [length, heads, D], a head for each of
    q's.
    """
    n, length = q.shape[0], k.shape[0]
    visible = torch.arange(length) < length - n + 1 + torch.arange(n)[:, None]
    scores = torch.einsum("nhd,lhd->nhl", q, k) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights, scores, visible[:, None]


def kv_attention_bound(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, codes_v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Bound on |kv_attention - exact| for one sequence, before rounding to the output's dtype.

    A score moves by at most eps: each q' of a part by half of max|q'| / 32767, times the sum of
    |k| over the part, plus float32 rounding of the products. Softmax weights then change by a
    factor within exp(+-2 eps). The weight p s of a code c (s: V's scale) is rounded to a multiple
    of the block's largest p s over 32767.
    """
    length, head_dim, group = k.shape[0], q.shape[-1], q.shape[1] // k.shape[1]
    k, v, codes_v = (x.repeat_interleave(group, 1) for x in (k, v, codes_v))
    low = kv_pages.low_dims(head_dim)
    p, _, visible = weights_and_scores(q, k, scale)

    eps = 2.0**-20 * torch.einsum("nhd,lhd->nhl", q.abs(), k.abs())  # float32 products and sums
    for part in (slice(0, low), slice(low, head_dim)):
        step = q[..., part].abs().amax(-1) / 32767
        eps += step[..., None] / 2 * k[..., part].abs().sum(-1).T[None]
    eps = (eps * abs(scale)).masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    bound = torch.expm1(2 * eps + 2.0**-20) * torch.einsum("nhl,lhd->nhd", p, v.abs())

    v_scale = (v.amax(-1) - v.amin(-1)) / 15  # [length, heads], at least either part's scale
    for begin in range(0, length, BLOCK):
        block = slice(begin, begin + BLOCK)
        top = (p[..., block] * v_scale[block].T[None]).amax(-1, keepdim=True)
        bound += 1.01 * top / 65534 * codes_v[block].sum(0)[None]
    return bound


def prefill_bound(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Bound on |prefill.attend - exact| for one sequence, arguments in float64.

    With u half a unit in the last place of `dtype` and `tiny` half its smallest number: q and k
    round by u of themselves or tiny, and D products are summed in float32, so that a score moves by
    at most eps; softmax weights then change by a factor within exp(+-2 eps). Weights (before the
    division by their sum, which is at least 1) and v round by u or tiny too; sums over tokens are
    float32; the output rounds by u.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    info = torch.finfo(dtype)
    u, tiny = info.eps / 2, info.smallest_normal * info.eps / 2
    p, scores, visible = weights_and_scores(q, k, scale)
    length, head_dim = len(k), q.shape[-1]

    eps = (2 * u + u * u + (head_dim + 2) * 2.0**-24) * torch.einsum(
        "nhd,lhd->nhl", q.abs(), k.abs()
    )
    eps += tiny * (q.abs().sum(-1)[..., None] + k.abs().sum(-1).T[None])
    # A float32 score, and float32's exp2 of it.
    eps = eps * abs(scale) + 2.0**-22 * (1 + scores.abs())
    eps = eps.masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    # Weights that still add up to 1 move the result by what v differs from it.
    exact = torch.einsum("nhl,lhd->nhd", p, v)
    spread = torch.einsum("nhl,nhld->nhd", p, (v.transpose(0, 1) - exact[:, :, None]).abs())
    relative = 2 * u + u * u + 2 * (length + 8) * 2.0**-24
    bound = torch.expm1(2 * eps) * spread + relative * torch.einsum("nhl,lhd->nhd", p, v.abs())
    bound += tiny * (1 + torch.einsum("nhl,lhd->nhd", visible.double().expand_as(p), v.abs()))
    return bound + u * (exact.abs() + bound)
