"""A whole model in transformers, quantized and in BF16: prefill, decode and memory in one run.

Both models have random weights. The quantized one is checked first: its logits against the
reference path along its own codes (testing.lockstep), in float32 and in BF16, and a decode step
against the same position of a longer prefill. On a GPU calls are CUDA graphs (our decode step by
`nn.DecodeGraph`), compared with the eager calls first and timed beside them; on a CPU they are
eager, the way `generate` calls.

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
from resq_kernels.config import ResQConfig
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.kv_cache import cache_name
from resq_kernels.testing import bench_graphs, bench_models, cuda_timing
from resq_kernels.testing.bench_device import BenchDevice, Call, Row, Work, nbytes
from resq_kernels.testing.lockstep import lockstep
from resq_kernels.testing.quantized_models import randomize

MODELS = bench_models.names()
DEFAULTS = {"shapes": ["llama-3.2-1b"], "batch": [1], "context": [128]}
BASELINE = "transformers bf16"
SEQUENCES, LOGITS = 2, 8  # of a check; logits of this many last tokens
# dtype -> (tokens, median over tokens of the logits' error in their norm, share of quantized rows
# that the reference may not take over). In float32 both are 3e-7 and 0, whatever the depth and with
# float16 attention in the prefill too (nn.prefill, from 65 tokens on); queries 2 % too large give
# 0.13 and 0.6. BF16 rounds values across the edges of codes (0.11 of the rows of 9 tokens and 16
# layers, 0.76 of 70), after which a token goes its own way: few tokens there, and the median.
ALLOWED = {torch.float32: (70, 1e-3, 0.05), torch.bfloat16: (9, 2e-2, 0.25)}
STEP_TOLERANCE = 2e-2  # the head's BF16 product may sum in another order for one row


@torch.no_grad()
def build(name: str, layers: int | None, device: str, *, quantized: bool, **sizes: Any) -> Any:
    """A model of this shape with random weights, in BF16 beside its 4-bit parts; `sizes` replace
    fields of its configuration."""
    config = AutoConfig.for_model(**bench_models.configuration(name, layers) | sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if quantized:
        randomize(model, ResQConfig(high_fraction=bench_models.HIGH_FRACTION))
    return model.eval()


def _logits(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return model(ids, **options).logits


@torch.no_grad()
def why_wrong(model: Any) -> str | None:
    """What of a BF16 model differs from the reference, or None."""
    device, rotary = model.device, copy.deepcopy(model.model.rotary_emb)
    options = {"use_cache": False, "logits_to_keep": LOGITS}
    for dtype, (tokens, most_error, most_refused) in ALLOWED.items():
        model.to(dtype)
        model.model.rotary_emb = copy.deepcopy(rotary)  # its frequencies stay float32
        ids = random_tokens(model, SEQUENCES, tokens)
        with lockstep(model, partial(_logits, model, ids, options)) as (logits, agreement):
            expected = model.to("cpu")(ids.cpu(), **options).logits
        model.to(device)
        if (error := float(bench_graphs.errors(logits, expected).median())) > most_error:
            return f"{dtype}: logits differ from the reference by {error:.2g} of their norm"
        if agreement.refused > most_refused * agreement.rows:
            counts = f"{agreement.refused} of {agreement.rows}"
            return f"{dtype}: {counts} quantized rows are not the reference's"
    if (error := _step_error(model)) > STEP_TOLERANCE:
        return f"a decode step differs from the prefill by {error:.2g} of its norm"
    return None


def _step_error(model: Any) -> float:
    """The largest error of a decode step against the last token of a prefill in the same bits."""
    attentions = [module for module in model.modules() if isinstance(module, ResQAttention)]
    for attention in attentions:
        attention.batch_invariant = True
    ids = random_tokens(model, SEQUENCES, ALLOWED[torch.float32][0])
    whole = model(ids, use_cache=False, logits_to_keep=1).logits
    cache = filled_cache(model, ids[:, :-1])
    step = model(ids[:, -1:], **given(model, cache)).logits
    for attention in attentions:
        attention.batch_invariant = False
    return float(bench_graphs.errors(step, whole).max())


def random_tokens(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """int64 [batch, tokens] on the model's device."""
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of a model or of a decoder layer."""
    return {cache_name(model): cache, "use_cache": True}


def filled_cache(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The model's cache after the tokens ids int64 [batch, tokens]."""
    cache = DynamicCache(config=model.config)
    model(ids, logits_to_keep=1, **given(model, cache))
    return cache


def prefill(model: Any, ids: torch.Tensor) -> Call:
    """A pass over ids int64 [batch, tokens] that fills a new cache and returns the last logits."""
    return lambda i: model(ids, use_cache=True, logits_to_keep=1).logits


def decode(model: Any, ids: torch.Tensor) -> tuple[Call, Any]:
    """A step after the tokens ids, which is then forgotten again; its cache."""
    cache = filled_cache(model, ids)
    token, argument = ids[:, -1:].contiguous(), given(model, cache)

    def step(i: int) -> torch.Tensor:
        logits = model(token, **argument).logits
        cache.crop(-1)
        return logits

    return step, cache


def captured_decode(model: Any, ids: torch.Tensor, cache: Any) -> Call:
    """`decode` as a CUDA graph, over the tokens ids that are in `cache` already."""
    token = ids[:, -1:].contiguous()
    if hasattr(cache.layers[0], "paged"):
        return bench_graphs.decode_graph(model, cache, token)
    one = bench_graphs.one_step_cache([(layer.keys, layer.values) for layer in cache.layers])
    return cuda_timing.captured(lambda i: model(token, **given(model, one)).logits)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tokens in a cache, 4-bit pages or float tensors."""
    return sum(
        layer.paged.memory_bytes() if hasattr(layer, "paged") else nbytes(layer.keys, layer.values)
        for layer in cache.layers
    )


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a module, packed weights and their sums included."""
    return nbytes(*model.parameters(), *model.buffers())


@torch.no_grad()
def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks every model, then times prefill and decode of every context and batch.

    Args:
        bench: the device.
        args: the options of `resq bench`: shapes, batch, context, layers.
        missing: gets name -> reason for each baseline that cannot be captured.

    Raises:
        RuntimeError: the quantized model's results are not the reference's, or a captured call's
            are not the eager one's.
    """
    for name in args.shapes:
        ours = build(name, args.layers, bench.device, quantized=True)
        if reason := why_wrong(ours):
            raise RuntimeError(f"model: {name}: {reason}")
        models = {"ours": ours, BASELINE: build(name, args.layers, bench.device, quantized=False)}
        for context in args.context:
            for batch in args.batch:
                yield from _rows(bench, name, models, batch, context, missing)


def _rows(
    bench: BenchDevice,
    name: str,
    models: dict[str, Any],
    batch: int,
    context: int,
    missing: dict[str, str],
) -> Iterator[Row]:
    ours = models["ours"]
    ids = random_tokens(ours, batch, context)
    steps, caches = {}, {}
    for key, model in models.items():
        steps[key], caches[key] = decode(model, ids)
    memory = {key: weight_bytes(m) + cache_bytes(caches[key]) for key, m in models.items()}
    shape, depth = bench_models.shape(name), ours.config.num_hidden_layers
    products = batch * depth * sum(n * k for n, k in map(shape.linear, LINEARS))
    # Everything is read once; of the embedding only the rows of the tokens, unless it is the head.
    embedding = 0 if shape.tied else weight_bytes(ours.get_input_embeddings())
    passes = {key: prefill(model, ids) for key, model in models.items()}
    if bench.on_gpu:
        graphs = {key: partial(captured_decode, models[key], ids, caches[key]) for key in models}
        steps = bench_graphs.added(steps, graphs, STEP_TOLERANCE, missing)
        graphs = {key: partial(cuda_timing.captured, call) for key, call in passes.items()}
        passes = bench_graphs.added(passes, graphs, STEP_TOLERANCE, missing)
    for kind, tokens, candidates in (("prefill", context, passes), ("decode", 1, steps)):
        place: Row = {"model": name, "layer": f"{kind} {context}", "batch": batch}
        place |= {"shape": [batch, context], "layers": depth}
        work = Work(
            op=f"model_{kind}",
            place=place,
            moved=memory["ours"] - embedding,
            products=products * tokens,
        )
        for row in bench.rows(work, bench.alternate(candidates, eager=True)):
            theirs = "ours" if row["baseline"].startswith("ours") else BASELINE
            for key, side in (("ours", "ours"), (theirs, "baseline")):
                speed = batch * tokens / row[f"{side}_us"] * 1e6
                row[f"{side}_tokens_per_s"], row[f"{side}_bytes"] = round(speed, 2), memory[key]
            yield row
