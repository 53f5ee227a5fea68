"""A whole model in transformers, quantized and in BF16: prefill, decode and memory in one run.

Both models have random weights. The quantized one is checked first: its logits against the
reference path that follows its codes (testing.lockstep), in float32 and in BF16, and a decode step
against the same position of a longer prefill. On a GPU calls are CUDA graphs (our decode step by
`nn.DecodeGraph`); they are compared with the eager calls, and both are timed. On a CPU calls are
eager, as in `generate`.

    resq bench model --shapes llama-3.2-1b --layers 4 --batch 1 --context 128
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from resq_kernels.architecture import LINEARS
from resq_kernels.bench import cuda_timing, graphs, models
from resq_kernels.bench.device import BenchDevice, Call, Row, Work, nbytes
from resq_kernels.config import ResQConfig
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.kv_cache import cache_name
from resq_kernels.testing.lockstep import lockstep
from resq_kernels.testing.quantized_models import randomize

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3.2-1b"], "batch": [1], "context": [128], "layers": None}
BASELINE = "transformers bf16"
SEQUENCES, LOGITS = 2, 8  # of a check: sequences, and last tokens whose logits are compared
# dtype -> (tokens, most error, most refused): the median over tokens of the logits' error relative
# to their norm, and the share of quantized rows in which the reference may refuse the kernels'
# codes. Measured in float32: 3e-7 and 0 at any depth, also with the float16 attention of a prefill
# (nn.prefill, from 65 tokens on); queries that are 2 % too large give 0.13 and 0.6. In BF16 values
# round to other codes (0.11 of the rows of 9 tokens and 16 layers, 0.76 of 70 tokens), after which
# a token's values diverge: hence few tokens, and the median.
# Codes of 8 bits have edges 16 times as near (0.31 of 9 tokens), hence a bound by `lo_bits`.
ALLOWED = {
    torch.float32: (70, 1e-3, {4: 0.05, 8: 0.05}),
    torch.bfloat16: (9, 2e-2, {4: 0.25, 8: 0.5}),
}
STEP_TOLERANCE = 2e-2  # torch may sum the BF16 product of a single row in another order


@torch.no_grad()
def build(
    name: str, layers: int | None, device: str, *, options: ResQConfig | None, **sizes: Any
) -> Any:
    """A model of this shape with random weights, BF16 wherever it is not quantized by `options`;
    `sizes` replace fields of its configuration."""
    config = AutoConfig.for_model(**models.configuration(name, layers) | sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if options is not None:
        randomize(model, options)
    return model.eval()


def _logits(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return model(ids, **options).logits


@torch.no_grad()
def why_wrong(model: Any) -> str | None:
    """A sentence about how a quantized BF16 model differs from the reference, or None."""
    device, rotary = model.device, copy.deepcopy(model.model.rotary_emb)
    options = {"use_cache": False, "logits_to_keep": LOGITS}
    lo_bits = model.model.layers[0].self_attn.o_proj.row_format.lo_bits
    for dtype, (tokens, most_error, most_refused) in ALLOWED.items():
        model.to(dtype)
        model.model.rotary_emb = copy.deepcopy(rotary)  # its frequencies stay float32
        ids = random_tokens(model, SEQUENCES, tokens)
        with lockstep(model, partial(_logits, model, ids, options)) as (logits, agreement):
            expected = model.to("cpu")(ids.cpu(), **options).logits
        model.to(device)
        if (error := float(graphs.errors(logits, expected).median())) > most_error:
            return f"{dtype}: logits differ from the reference by {error:.2g} of their norm"
        if agreement.refused > most_refused[lo_bits] * agreement.rows:
            counts = f"{agreement.refused} of {agreement.rows}"
            return f"{dtype}: {counts} quantized rows are not the reference's"
    if (error := _step_error(model)) > STEP_TOLERANCE:
        return f"a decode step differs from the prefill by {error:.2g} of its norm"
    return None


def _step_error(model: Any) -> float:
    """The largest error of a decode step against the last token of a prefill by kv_attention."""
    attentions = [module for module in model.modules() if isinstance(module, ResQAttention)]
    for attention in attentions:
        attention.batch_invariant = True
    ids = random_tokens(model, SEQUENCES, ALLOWED[torch.float32][0])
    whole = model(ids, use_cache=False, logits_to_keep=1).logits
    cache = filled_cache(model, ids[:, :-1])
    step = model(ids[:, -1:], **given(model, cache)).logits
    for attention in attentions:
        attention.batch_invariant = False
    return float(graphs.errors(step, whole).max())


def random_tokens(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """int64 [batch, tokens] on the model's device."""
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as keyword arguments of a model or of a decoder layer."""
    return {cache_name(model): cache, "use_cache": True}


def filled_cache(model: Any, ids: torch.Tensor) -> DynamicCache:
    """A new cache that holds the tokens ids, int64 [batch, tokens]."""
    cache = DynamicCache(config=model.config)
    model(ids, logits_to_keep=1, **given(model, cache))
    return cache


def prefill(model: Any, ids: torch.Tensor) -> Call:
    """A forward pass over ids int64 [batch, tokens] with a new cache; returns the last logits."""
    return lambda i: model(ids, use_cache=True, logits_to_keep=1).logits


def decode(model: Any, ids: torch.Tensor) -> tuple[Call, Any]:
    """A decode step after the tokens ids, which is undone after each call, and its cache."""
    cache = filled_cache(model, ids)
    token, argument = ids[:, -1:].contiguous(), given(model, cache)

    def step(i: int) -> torch.Tensor:
        logits = model(token, **argument).logits
        cache.crop(-1)
        return logits

    return step, cache


def captured_decode(model: Any, ids: torch.Tensor, cache: Any) -> Call:
    """`decode` as a CUDA graph; `cache` already holds the tokens ids."""
    token = ids[:, -1:].contiguous()
    if hasattr(cache.layers[0], "paged"):
        return graphs.decode_graph(model, cache, token)
    one = graphs.one_step_cache([(layer.keys, layer.values) for layer in cache.layers])
    return cuda_timing.captured(lambda i: model(token, **given(model, one)).logits)


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache: of its 4-bit pages or of its float tensors."""
    return sum(
        layer.paged.memory_bytes() if hasattr(layer, "paged") else nbytes(layer.keys, layer.values)
        for layer in cache.layers
    )


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a module, including packed weights and their sums."""
    return nbytes(*model.parameters(), *model.buffers())


@torch.no_grad()
def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks every model, then times prefill and decode of every context and batch.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch, context, layers.
        missing: receives name -> reason for each baseline that cannot be captured.
    """
    for name in args.shapes:
        ours = build(name, args.layers, bench.device, options=models.OPTIONS)
        if reason := why_wrong(ours):
            bench.failures.append(f"model: {name}: {reason}")
            continue
        theirs = build(name, args.layers, bench.device, options=None)
        sides = {"ours": ours, BASELINE: theirs}
        for context in args.context:
            for batch in args.batch:
                yield from bench.attempted(
                    partial(_rows, bench, name, sides, batch, context, missing)
                )


def _rows(
    bench: BenchDevice,
    name: str,
    sides: dict[str, Any],
    batch: int,
    context: int,
    missing: dict[str, str],
) -> Iterator[Row]:
    ours = sides["ours"]
    ids = random_tokens(ours, batch, context)
    steps, caches = {}, {}
    for key, model in sides.items():
        steps[key], caches[key] = decode(model, ids)
    memory = {key: weight_bytes(m) + cache_bytes(caches[key]) for key, m in sides.items()}
    shape, depth = models.shape(name), ours.config.num_hidden_layers
    products = batch * depth * sum(n * k for n, k in map(shape.linear, LINEARS))
    # Every weight is read once but the basis of hidden states, which is for callers; of an
    # embedding only a few rows are, unless it is the head too.
    embedding = ours.get_input_embeddings()
    unread = weight_bytes(embedding.basis if shape.tied else embedding)
    passes = {key: prefill(model, ids) for key, model in sides.items()}
    if bench.on_gpu:
        makers = {key: partial(captured_decode, sides[key], ids, caches[key]) for key in sides}
        steps = graphs.added(steps, makers, STEP_TOLERANCE, missing)
        makers = {key: partial(cuda_timing.captured, call) for key, call in passes.items()}
        passes = graphs.added(passes, makers, STEP_TOLERANCE, missing)
    for kind, tokens, candidates in (("prefill", context, passes), ("decode", 1, steps)):
        place: Row = {"model": name, "layer": f"{kind} {context}", "batch": batch}
        place |= {"shape": [batch, context], "layers": depth}
        work = Work(
            op=f"model_{kind}",
            place=place,
            moved=memory["ours"] - unread,
            products=products * tokens,
        )
        for row in bench.rows(work, bench.alternate(candidates, eager=True)):
            theirs = "ours" if row["baseline"].startswith("ours") else BASELINE
            for key, side in (("ours", "ours"), (theirs, "baseline")):
                speed = batch * tokens / row[f"{side}_us"] * 1e6
                row[f"{side}_tokens_per_s"], row[f"{side}_bytes"] = round(speed, 2), memory[key]
            yield row
