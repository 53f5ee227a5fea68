"""Held-out perplexity of a language model, and of token frequencies as a yardstick."""

from __future__ import annotations

import math

import torch
from torch.nn import functional
from transformers import PreTrainedModel

EVAL_WINDOW = 512
"""Tokens per evaluation window."""


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    window: int = EVAL_WINDOW,
    limit: int | None = None,
) -> float:
    """Measure perplexity over windows that do not overlap.

    Formula: ``exp(mean over windows of (mean cross entropy of the window's tokens 1..n-1))``; no
    begin token is added and an incomplete last window is dropped.

    Args:
        model: a causal language model.
        tokens: one-dimensional token ids.
        window: tokens per window.
        limit: most windows to use, spread evenly, or None for all.

    Returns:
        The perplexity.
    """
    windows = tokens[: tokens.numel() // window * window].view(-1, window)
    if limit is not None and limit < windows.shape[0]:
        windows = windows[torch.linspace(0, windows.shape[0] - 1, limit).long()]
    was_training = model.training
    model.eval()
    losses: list[float] = []
    with torch.inference_mode():
        for batch in windows.split(4):
            logits = model(input_ids=batch, use_cache=False).logits.float()
            loss = functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"
            )
            losses.extend(loss.mean(dim=1).tolist())
    model.train(was_training)
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(
    training: torch.Tensor, heldout: torch.Tensor, vocab_size: int, window: int = EVAL_WINDOW
) -> float:
    """Measure the held-out perplexity of token frequencies, the model without any context.

    Formula: ``p(t) = (count(t) + 1) / (N + V)`` from the training tokens, and ``exp`` of the mean
    of ``-log p`` over the same targets as :func:`perplexity`.

    Args:
        training: training token ids.
        heldout: held-out token ids.
        vocab_size: ``V``, the number of token ids.
        window: tokens per window, as in :func:`perplexity`.

    Returns:
        The perplexity.
    """
    counts = torch.bincount(training, minlength=vocab_size).double() + 1.0
    log_p = (counts / counts.sum()).log()
    windows = heldout[: heldout.numel() // window * window].view(-1, window)
    return math.exp(-log_p[windows[:, 1:]].mean().item())
