"""Perplexity by the protocol of the GPTQ, QuaRot and ResQ papers; divergence from a reference."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of logits that are turned into float32 at a time: 256 rows of a vocabulary of 128k take
# 131 MB; a whole window of 2048 would take 1 GB, twice.
_ROWS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of `perplexity`.

    Attributes:
        perplexity: exp of the mean cross entropy per token.
        tokens: tokens that were evaluated, windows x seqlen; the tail of the text is dropped.
        seqlen: tokens of a window; the first one is context only.
        windows: number of windows.
        kl_to_reference: mean KL(reference || model) in nats over all targets, or None.
        top1_agreement: share of targets whose likeliest token is the reference's too, or None.
        seconds: time of the model's forward passes alone.
        tokens_per_second: tokens / seconds.
    """

    perplexity: float
    tokens: int
    seqlen: int
    windows: int
    kl_to_reference: float | None
    top1_agreement: float | None
    seconds: float
    tokens_per_second: float


def cut_windows(tokens: torch.Tensor, seqlen: int, max_windows: int | None = None) -> torch.Tensor:
    """Cuts the text into consecutive windows that do not overlap; the tail is dropped.

    Args:
        tokens: ids of the whole text, int64 [tokens].
        seqlen: tokens of a window, at least 2.
        max_windows: use the first windows only.

    Returns:
        int64 [windows, seqlen].

    Raises:
        ValueError: seqlen is below 2, or the text is shorter than one window.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen: expected at least 2 (context and target), got {seqlen}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows: expected at least 1, got {max_windows}")
    count = tokens.numel() // seqlen
    if count == 0:
        raise ValueError(
            f"text: expected at least one window of {seqlen} tokens, got {tokens.numel()} tokens; "
            "give a longer text or a smaller seqlen"
        )
    count = count if max_windows is None else min(count, max_windows)
    return tokens[: count * seqlen].view(count, seqlen)


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seqlen: int,
    max_windows: int | None = None,
    reference: PreTrainedModel | None = None,
    progress: str | None = None,
) -> Evaluation:
    """Perplexity of a text, window by window; with a reference also the divergence from it.

    Formula: exp of the mean over windows of the mean over t = 1 .. seqlen - 1 of
    -log p(x_t | x_0 .. x_{t-1}); KL = mean over the same targets of
    sum_v p_ref(v) (log p_ref(v) - log p(v)); agreement = share of them with
    argmax_v p_ref(v) = argmax_v p(v).

    Args:
        model: any causal language model; quantized ones run their kernels.
        tokens: ids of the whole text without BOS, int64 [tokens].
        seqlen: tokens of a window, at least 2.
        max_windows: use the first windows only.
        reference: a model over the same vocabulary, run on the same windows.
        progress: label of a progress bar on stderr (shown after two seconds), or None.

    Raises:
        ValueError: the text is shorter than one window, an id is outside the vocabulary, the
            vocabularies differ, or a logit is not finite (the message names the window).

    Source: arXiv 2210.17323 (GPTQ) and its published evaluation; arXiv 2412.14363, section 5.
    """
    windows = cut_windows(tokens, seqlen, max_windows)
    _check_vocabulary(model, windows, reference)
    loss_sum = kl_sum = seconds = 0.0
    agreed = 0
    bar = tqdm(windows, desc=progress, unit="window", delay=2, disable=progress is None)
    with torch.inference_mode(), _evaluating(model), _evaluating(reference):
        for index, window in enumerate(bar):
            start = time.perf_counter()
            logits = _logits(model, window)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            seconds += time.perf_counter() - start
            other = None if reference is None else _logits(reference, window)
            loss, kl, same = _window_sums(logits, window, other)
            if not math.isfinite(loss):
                raise ValueError(f"perplexity: the logits of window {index} are not finite")
            loss_sum, kl_sum, agreed = loss_sum + loss, kl_sum + kl, agreed + same
            bar.set_postfix(
                ppl=f"{math.exp(loss_sum / ((index + 1) * (seqlen - 1))):.3f}", refresh=False
            )
    targets = windows.shape[0] * (seqlen - 1)
    return Evaluation(
        perplexity=math.exp(loss_sum / targets),
        tokens=windows.numel(),
        seqlen=seqlen,
        windows=windows.shape[0],
        kl_to_reference=None if reference is None else kl_sum / targets,
        top1_agreement=None if reference is None else agreed / targets,
        seconds=seconds,
        tokens_per_second=windows.numel() / seconds,
    )


class _evaluating:
    """Puts a model into eval mode for a while."""

    def __init__(self, model: PreTrainedModel | None) -> None:
        self.model = model

    def __enter__(self) -> None:
        if self.model is not None:
            self.training = self.model.training
            self.model.eval()

    def __exit__(self, *error: object) -> None:
        if self.model is not None:
            self.model.train(self.training)


def _logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Logits of the positions with a target, [seqlen - 1, vocabulary], in the model's dtype."""
    ids = window.unsqueeze(0).to(model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1]


def _window_sums(
    logits: torch.Tensor, window: torch.Tensor, reference: torch.Tensor | None
) -> tuple[float, float, int]:
    """Sums over a window's targets: -log p(target) and KL(reference || model) in nats, and the
    number of those for which both find the same token likeliest."""
    loss, kl, same = 0.0, 0.0, 0
    for start in range(0, logits.shape[0], _ROWS):
        log_p = functional.log_softmax(logits[start : start + _ROWS].float(), dim=-1)
        targets = window[start + 1 : start + 1 + log_p.shape[0]].to(log_p.device)
        loss -= log_p.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64).item()
        if reference is not None:
            rows = reference[start : start + _ROWS].to(log_p.device, torch.float32)
            log_ref = functional.log_softmax(rows, dim=-1)
            kl += (log_ref.exp() * (log_ref - log_p)).sum(dtype=torch.float64).item()
            same += int((rows.argmax(dim=-1) == logits[start : start + _ROWS].argmax(dim=-1)).sum())
    return loss, kl, same


def _check_vocabulary(
    model: PreTrainedModel, windows: torch.Tensor, reference: PreTrainedModel | None
) -> None:
    size = model.config.vocab_size
    if int(windows.max()) >= size:
        raise ValueError(
            f"text: token {int(windows.max())} is outside the model's vocabulary of {size}; "
            "the tokenizer belongs to another model"
        )
    if reference is not None and reference.config.vocab_size != size:
        raise ValueError(
            f"reference: expected a vocabulary of {size} words, got {reference.config.vocab_size}"
        )
