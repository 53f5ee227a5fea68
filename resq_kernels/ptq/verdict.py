"""The verdict on a quantized folder: its predictions and the 16-bit model's on text that neither
calibration nor training saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resq_kernels.config import ResQConfig
from resq_kernels.evaluate import Measured, WindowSums, window_sums
from resq_kernels.formats import QuantizedWeight
from resq_kernels.intervals import Interval, mean_interval
from resq_kernels.ptq.calibrate import batches, layer_bar
from resq_kernels.ptq.decoder import DecoderLayer, Rope, product_dtype
from resq_kernels.ptq.rounded import GROUPS, RoundedLayer, stored_layer
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.vocabulary import LOGIT_ROWS, FloatHead, RoundedVocabulary
from resq_kernels.safetensors_io import CheckpointReader

GRADES = (
    (0.03, "as good as"),
    (0.1, "close to"),
    (0.25, "somewhat worse than"),
    (1.0, "much worse than"),
)
"""Below which KL, in nats, what is said of the model beside the 16-bit one. llama.cpp's figures for
Llama-3-8B: 0.0014 in 8 bits, 0.011 in Q5_K_M; our SmolLM2-135M 0.15, with 8-bit inputs 0.07;
rounded to nearest it is lost, at 5.6."""
LOST = "useless beside"
WIDE = 8
"""Bits of activations with which every folder is measured: who has them at no cost should know what
they give."""


@torch.no_grad()
def verdicts(
    model: SourceModel,
    folder: Path,
    held_out: Sequence[torch.Tensor],
    rope: Rope,
    config: ResQConfig,
    device: str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any] | None]:
    """Measures a finished folder against its source, layer by layer.

    Formula: that of `evaluate.perplexity`, mean over the targets of all windows, and the intervals
    of `intervals.mean_interval` over windows. The quantized layers are computed by the operators
    that run them, from the folder's tensors; between linears both models are in float32. A folder
    for 4-bit activations is measured with 8-bit ones as well, as `lo_bits=8` loads it.

    Memory: a layer and the embedding of both models, and the states of all windows of all.

    Args:
        model: the source.
        folder: what was made of it.
        held_out: sets of windows, int64 [windows, seqlen] each.
        rope: tables of `rope_tables`.
        config: how the folder was quantized.
        device: where the layers are computed.
        progress: a bar on stderr.

    Returns:
        For every set the keys of docs/cli.md, or None without a target. A figure that is not finite
        is None. `with_lo_bits_8` has the figures of 8-bit activations, None where they are the
        folder's own.
    """

    def has_targets(windows: torch.Tensor) -> bool:
        return len(windows) > 0 and windows.shape[1] > 1

    sets = list(filter(has_targets, held_out))
    if not sets:
        return [None] * len(held_out)
    reader, shape = CheckpointReader(folder), model.shape
    products = product_dtype(model.dtype, device)

    def load(name: str) -> torch.Tensor:
        return reader.load(name).to(device)

    vocabulary = RoundedVocabulary(load, shape, config, products)
    # The head's input has no low part: embedding and head are the same in all of them.
    configs = [config] if config.lo_bits == WIDE else [config, config.with_lo_bits(WIDE)]
    exact = [model.embed(windows) for windows in sets]
    rounded = [[vocabulary.embed(windows.to(device)).cpu() for windows in sets] for _ in configs]
    for index in layer_bar(range(shape.layers), "verdict", progress):
        source = model.layer(index, fold_norms=True).to(device, products)
        stored, weights = stored_layer(load, index, shape, config)
        kernels = [RoundedLayer(shape, stored, rope, config) for config in configs]
        for names in GROUPS:
            kernels[0].round(names, QuantizedWeight.cat([weights[name] for name in names]))
        for other in kernels[1:]:
            other.packed = kernels[0].packed
        decoder = DecoderLayer(shape, source, rope)
        forwards = (decoder.forward, *(layer.forward for layer in kernels))
        for states, forward in zip((exact, *rounded), forwards, strict=True):
            for some in states:
                for part in batches(*some.shape[:2]):
                    some[part] = forward(some[part].to(device)).cpu()
    head = FloatHead(model, products, device)

    def exact_logits(states: torch.Tensor) -> torch.Tensor:
        return head.logits(head.norm(states.to(device)))

    def rounded_logits(states: torch.Tensor) -> torch.Tensor:
        return vocabulary.logits(states.to(device))

    found = []
    for windows, states, *others in zip(sets, exact, *rounded, strict=True):
        figures = [
            _figures(*measure_states(windows, states, other, exact_logits, rounded_logits))
            for other in others
        ]
        found.append({**figures[0], "with_lo_bits_8": figures[1] if len(figures) > 1 else None})
    verdict = iter(found)
    return [next(verdict) if has_targets(windows) else None for windows in held_out]


def measure_states(
    windows: torch.Tensor,
    exact: torch.Tensor,
    rounded: torch.Tensor,
    exact_logits: Callable[[torch.Tensor], torch.Tensor],
    rounded_logits: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Measured, Measured]:
    """What `evaluate.measure` finds for a model and its reference, from their last states.

    Args:
        windows: ids, int64 [windows, seqlen].
        exact, rounded: states of the reference and of the model, [windows, seqlen, hidden].
        exact_logits, rounded_logits: give logits of some rows of them.

    Returns:
        The reference's and the model's, without times.
    """
    targets = windows.shape[1] - 1
    reference, measured = (Measured([], targets, 0.0) for _ in range(2))
    for ids, *states in zip(windows, exact, rounded, strict=True):
        parts = []
        for start in range(0, targets, LOGIT_ROWS):
            rows = slice(start, min(start + LOGIT_ROWS, targets))
            some, (x, y) = ids[start : rows.stop + 1], (state[rows] for state in states)
            wanted = exact_logits(x)
            sums = window_sums(wanted, some, None), window_sums(rounded_logits(y), some, wanted)
            parts.append(sums)
        for found, whole in zip((reference, measured), zip(*parts, strict=True), strict=True):
            found.sums.append(WindowSums(*map(sum, zip(*whole, strict=True))))
    return reference, measured


def _figures(reference: Measured, measured: Measured) -> dict[str, Any]:
    values = measured.gaps(reference), measured.divergences, measured.agreements
    gap, kl, top1 = map(_interval, values)
    figures = {
        "reference_perplexity": reference.perplexity,
        "perplexity": measured.perplexity,
        "gap": gap.mean,
        "gap_interval": gap.half,
        "kl_to_reference": kl.mean,
        "kl_interval": kl.half,
        "top1_agreement": top1.mean,
        "top1_interval": top1.half,
    }
    return {
        "grade": grade(kl.mean),
        "windows": len(measured.sums),
        "seqlen": measured.targets + 1,
        **{
            name: value if value is not None and math.isfinite(value) else None
            for name, value in figures.items()
        },
    }


def _interval(values: Sequence[float]) -> Interval:
    finite = all(map(math.isfinite, values))
    return mean_interval(values) if finite else Interval(math.nan, None)


def grade(divergence: float) -> str:
    """What is said of a model with this KL from the 16-bit one, in nats; NaN is the worst."""
    return next((words for limit, words in GRADES if divergence < limit), LOST)


def is_close(report: Mapping[str, Any]) -> bool:
    """Whether every verdict of a report is one of the two best."""
    best = [words for _, words in GRADES[:2]]
    found = (report["verdict"], report["verdict_in_dialogues"])
    return all(verdict["grade"] in best for verdict in found if verdict is not None)


def verdict_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdicts of a report as rows of a table; one that says why there is none."""
    text, dialogues = report["verdict"], report["verdict_in_dialogues"]
    rows = []
    if text is not None:
        rows += [
            ("verdict", f"{text['grade']} the 16-bit model"),
            ("KL to 16-bit", _divergence(text)),
            (
                "perplexity",
                f"{_number(text, 'reference_perplexity', '.2f')} -> {_perplexity(text)}",
            ),
            *_wide("with --lo-bits 8", text),
            ("measured on", f"{text['windows']} held-out windows of {text['seqlen']} tokens"),
        ]
    if dialogues is not None:
        rows += [
            ("in dialogues", f"{dialogues['grade']} the 16-bit model, which wrote them"),
            ("KL in dialogues", _divergence(dialogues)),
            *_wide("and --lo-bits 8", dialogues),
        ]
    if not rows:
        rows.append(("verdict", "none: no window of the text was held out; `resq eval` gives one"))
    return rows


def _wide(name: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What 8-bit activations make of a verdict, as a row; none where they are the folder's own,
    and in a report from before they were measured."""
    wide = found.get("with_lo_bits_8")
    if wide is None:
        return []
    return [(name, f"KL {_divergence(wide)}, perplexity {_perplexity(wide)}")]


def _perplexity(found: Mapping[str, Any]) -> str:
    share = "" if found["gap"] is None else f" ({math.expm1(found['gap']):+.1%})"
    return _number(found, "perplexity", ".2f") + share


def _divergence(found: Mapping[str, Any]) -> str:
    spread = "" if found["kl_interval"] is None else f" +- {found['kl_interval']:.3f}"
    same = f"same likeliest token {_number(found, 'top1_agreement', '.1%')}"
    return f"{_number(found, 'kl_to_reference', '.3f')}{spread} nats, {same}"


def _number(found: Mapping[str, Any], name: str, form: str) -> str:
    return "not finite" if found[name] is None else format(found[name], form)
