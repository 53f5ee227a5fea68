"""The model card of the demonstration model, filled in from its training report."""

from __future__ import annotations

from typing import Any

_CARD = """\
---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
---

# Tiny Llama for demonstrations

A Llama-architecture language model of {parameters} parameters, small enough to be quantized,
evaluated and run on a CPU in seconds. It exists to show the quantization tools of this repository
at work on trained weights; it is not meant to be useful as a language model.

| | |
|---|---|
| layers / hidden / MLP width | 4 / 256 / 768 |
| query heads / key-value heads / head width | 4 / 2 / 64 |
| vocabulary | 2048, byte-level BPE, trained on the same text |
| embedding | shared between input and output |
| weights | bfloat16 |

## Training

`examples/train_tiny_llama.py` trained both the tokenizer and the model from random weights on text
that comes with Python {python} (`examples/stdlib_corpus.py`): the language reference topics of
`help()`, the docstrings of the standard library and its source files. About one module in twenty
is held out by a hash of its name. {status}

* {steps} AdamW steps of {batch} x {length} tokens
  (twice as many windows of half the length in the first {short_share:.0%} of the run).
* {tokens_seen} tokens seen in {training_minutes} minutes on the CPU; the training text has
  {training_tokens} tokens with prose counted {prose_repeats} times.
* Peak learning rate {peak_learning_rate}, cosine decay, weight decay {weight_decay},
  gradient norm clipped to 1, seed {seed}.
* The learning rate followed {clock}

| held-out perplexity per token | |
|---|---|
| this model, windows of {window_tokens} tokens | {heldout_perplexity:.2f} |
| token frequencies alone (unigram) | {unigram_perplexity:.1f} |

All numbers are in `training_report.json`, measured with the bfloat16 weights of this folder and
float32 arithmetic. Because tokens of this vocabulary are short, the perplexity cannot be compared
with models that use another tokenizer.

## Limits

* It has seen only documentation and code of one library in English. It continues text in that
  style; what it says is often wrong, and its code seldom works.
* It follows no instructions, and nothing was done about harmful output.
* It was trained on windows of {length} tokens. Longer contexts up to 2048 run, but were not
  trained.
* It may repeat short passages of the standard library, which is under the PSF License. The weights
  and the tokenizer are under Apache-2.0.
* Such a small model has much weaker outlier channels than large ones; `examples/outliers.py` adds
  them without changing the function.
"""


def model_card(report: dict[str, Any]) -> str:
    """Write the model card.

    Args:
        report: content of ``training_report.json``.

    Returns:
        Markdown text with the metadata header of a model repository.
    """
    status = "" if report["finished"] else "**Training has not finished; this is a checkpoint.**"
    clock = (
        "the number of steps."
        if report["minutes_limit"] is None
        else f"a time limit of {report['minutes_limit']:g} minutes,\n"
        "  so another run of the script gives a similar model, not the same one."
    )
    values = {**report, "status": status, "clock": clock}
    for name in ("parameters", "tokens_seen", "training_tokens"):
        values[name] = f"{report[name]:,}"
    return "\n".join(line.rstrip() for line in _CARD.format(**values).split("\n"))
