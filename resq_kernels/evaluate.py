"""Perplexity by the protocol of the GPTQ, QuaRot and ResQ papers; divergence from a reference."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits that are turned into float32 at a time, of a whole window of 2048 and a vocabulary of 128k
# they would take 1 GB, twice. On a CPU 2 MB: the four of a step stay in the cache, while 32 MB and
# more come new from the system, page by page (512 tokens of 49,152 words on two Zen 3 cores: 187
# ms; 323 with 8 MB, 550 with 50).
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 25


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
    models = {"model": model} if reference is None else {"reference": reference, "model": model}
    found = measure(models, windows, progress=progress)["model"]
    return Evaluation(
        perplexity=found.perplexity,
        tokens=windows.numel(),
        seqlen=seqlen,
        windows=windows.shape[0],
        kl_to_reference=None if reference is None else found.kl,
        top1_agreement=None if reference is None else found.top1,
        seconds=found.seconds,
        tokens_per_second=windows.numel() / found.seconds,
    )


class WindowSums(NamedTuple):
    """Sums over a window's targets: -log p(target) and KL(reference || model) in nats, and the
    number of those for which both find the same token likeliest."""

    loss: float
    kl: float
    agreed: int


@dataclasses.dataclass
class Measured:
    """What `measure` found for one model; every window has as many targets.

    Attributes:
        sums: of each window.
        targets: of a window, seqlen - 1.
        seconds: time of the model's forward passes alone.
    """

    sums: list[WindowSums]
    targets: int
    seconds: float

    @property
    def losses(self) -> list[float]:
        """Mean of -log p(target) in each window, in nats."""
        return [window.loss / self.targets for window in self.sums]

    def gaps(self, reference: Measured) -> list[float]:
        """Mean of -log p(target) above the reference's in each window, in nats."""
        return [a - b for a, b in zip(self.losses, reference.losses, strict=True)]

    @property
    def divergences(self) -> list[float]:
        """Mean of KL(reference || model) in each window, in nats."""
        return [window.kl / self.targets for window in self.sums]

    @property
    def agreements(self) -> list[float]:
        """Share of each window's targets whose likeliest token is the reference's too."""
        return [window.agreed / self.targets for window in self.sums]

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p over all targets."""
        try:
            return math.exp(self._mean(window.loss for window in self.sums))
        except OverflowError:  # beyond 709 nats a token
            return math.inf

    @property
    def kl(self) -> float:
        """Mean of KL(reference || model) over all targets, in nats."""
        return self._mean(window.kl for window in self.sums)

    @property
    def top1(self) -> float:
        """Share of all targets whose likeliest token is the reference's too."""
        return self._mean(window.agreed for window in self.sums)

    def _mean(self, sums: Iterable[float]) -> float:
        return sum(sums) / (self.targets * len(self.sums))


def measure(
    models: Mapping[str, PreTrainedModel], windows: torch.Tensor, *, progress: str | None = None
) -> dict[str, Measured]:
    """Runs models over windows, each once; the first model is the reference of the others.

    `perplexity` has the formulas. Logits of the reference and of one other model are in memory at
    a time. The divergence of the reference itself is 0.

    Args:
        models: name -> a causal language model; all over one vocabulary.
        windows: int64 [windows, seqlen], as `cut_windows` returns.
        progress: label of a progress bar on stderr (shown after two seconds), or None. It shows the
            perplexity of the last model.

    Raises:
        ValueError: an id is outside the vocabulary, the vocabularies differ, or a logit is not
            finite (the message names model and window).
    """
    _check_vocabulary(models, windows)
    targets = windows.shape[1] - 1
    found = {name: Measured([], targets, 0.0) for name in models}
    bar = tqdm(windows, desc=progress, unit="window", delay=2, disable=progress is None)
    with torch.inference_mode(), _evaluating(models.values()):
        for index, window in enumerate(bar):
            reference = None
            for name, model in models.items():
                start = time.perf_counter()
                logits = _logits(model, window)
                if logits.is_cuda:
                    torch.cuda.synchronize(logits.device)
                found[name].seconds += time.perf_counter() - start
                sums = window_sums(logits, window, reference)
                if not math.isfinite(sums.loss):
                    raise ValueError(f"{name}: the logits of window {index} are not finite")
                found[name].sums.append(sums)
                reference = logits if reference is None else reference
            bar.set_postfix(ppl=f"{found[name].perplexity:.3f}", refresh=False)
    return found


@contextlib.contextmanager
def _evaluating(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Puts models into eval mode for a while."""
    training = [(model, model.training) for model in models]
    try:
        for model, _ in training:
            model.eval()
        yield
    finally:
        for model, mode in training:
            model.train(mode)


def _logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Logits of the positions with a target, [seqlen - 1, vocabulary], in the model's dtype."""
    ids = window.unsqueeze(0).to(model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, :-1]


def window_sums(
    logits: torch.Tensor, window: torch.Tensor, reference: torch.Tensor | None
) -> WindowSums:
    """The sums of a window or of a part of it; without a reference the model is its own.

    Args:
        logits: [targets, vocabulary], of the positions before the targets.
        window: ids, int64 [targets + 1].
        reference: the reference's logits.
    """
    loss, kl, same = 0.0, 0.0, 0
    elements = _GPU_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS
    step = max(1, elements // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step].float()
        log_p = functional.log_softmax(part, dim=-1)
        targets = window[start + 1 : start + 1 + log_p.shape[0]].to(log_p.device)
        loss -= log_p.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64).item()
        if reference is None:
            same += log_p.shape[0]
        else:
            rows = reference[start : start + step].to(log_p.device, torch.float32)
            log_ref = functional.log_softmax(rows, dim=-1)
            p_ref = log_ref.exp()
            kl += p_ref.mul_(log_ref.sub_(log_p)).sum(dtype=torch.float64).item()
            same += int((rows.argmax(dim=-1) == part.argmax(dim=-1)).sum())
    return WindowSums(loss, kl, same)


def _check_vocabulary(models: Mapping[str, PreTrainedModel], windows: torch.Tensor) -> None:
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    (first, words), *others = sizes.items()
    for name, size in others:
        if size != words:
            raise ValueError(
                f"{first}: expected a vocabulary of {size} words as {name} has, got {words}"
            )
    if int(windows.max()) >= words:
        raise ValueError(
            f"text: token {int(windows.max())} is outside the model's vocabulary of {words}; "
            "the tokenizer belongs to another model"
        )
