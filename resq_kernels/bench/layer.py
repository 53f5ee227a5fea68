"""One decoder layer of a model, quantized and in BF16: a decode step and a prefill.

Ours is the layer of a loaded model: norms that quantize, fused projections, 4-bit pages. The
baseline is the BF16 layer of transformers, on a GPU also under torch.compile. A one-layer model is
checked the way `resq bench model` checks a whole one; then every timed call of ours is compared
with an ordinary call of the layer, and the compiled layer with the eager one. Weights and caches
are cold: calls rotate over copies of the layer. On a GPU all calls are CUDA graphs.

    resq bench layer --shapes llama-3-8b --batch 1,8 --context 2048
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from resq_kernels import kv_pages
from resq_kernels.architecture import LINEARS
from resq_kernels.bench import cuda_timing, graphs, models
from resq_kernels.bench.attention import random_cache
from resq_kernels.bench.device import BenchDevice, Call, Row, Work, nbytes
from resq_kernels.bench.model import build, cache_bytes, given, weight_bytes, why_wrong
from resq_kernels.nn.batch import AttentionMetadata, BatchState, ForwardPass
from resq_kernels.nn.kv_cache import ResQCache

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3.2-1b"], "batch": [1], "context": [128]}
BASELINE, COMPILED = "transformers bf16", "torch.compile bf16"
Copies = list[tuple[Any, dict[str, Any]]]  # layers, each with its own cache as keyword arguments
VOCABULARY = 512  # of the one-layer model; only its check reads logits
TOLERANCE = 2e-2  # relative to the norm of a token: fused operators round to BF16 at other places


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a layer is called with.

    Attributes:
        hidden: BF16 [B, L, K].
        rope: cos and sin, [B, L, D] each.
    """

    hidden: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, model: Any, batch: int, new: int, context: int) -> Tokens:
        """`new` random tokens of every sequence, after `context` others."""
        shape = (batch, new, model.config.hidden_size)
        hidden = torch.randn(shape, dtype=torch.bfloat16, device=model.device)
        positions = torch.arange(context, context + new, device=model.device).expand(batch, new)
        return cls(hidden, model.model.rotary_emb(hidden, positions))

    def rotated(self, copies: Copies, run: Callable[..., torch.Tensor]) -> Call:
        """A call that rotates over the copies, each of which has been called once beforehand."""
        for layer, options in copies:
            run(layer, self.hidden, self.rope, options)

        def call(i: int) -> torch.Tensor:
            layer, options = copies[i % len(copies)]
            return run(layer, self.hidden, self.rope, options)

        return call


def run_layer(
    layer: Any,
    hidden: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """The layer's output [B, L, K] for hidden [B, L, K]; `options` come from `with_cache`."""
    return layer(hidden, position_embeddings=rope, **options)


def with_cache(layer: Any, cache: Any) -> dict[str, Any]:
    """A cache as keyword arguments of a layer; None if keys and values are not kept."""
    return {} if cache is None else given(layer, cache)


def copies(bench: BenchDevice, layer: Any, cache: Any, **options: Any) -> Copies:
    """The layer with its cache and enough copies of both that each is cold when its turn comes;
    options are arguments of every call."""
    size = weight_bytes(layer)
    size += 0 if cache is None else cache_bytes(cache)
    found = [(layer, with_cache(layer, cache) | options)]
    for _ in range(bench.copy_count(size) - 1):
        other = copy.deepcopy(layer)
        found.append((other, with_cache(other, copy.deepcopy(cache)) | options))
    return found


def paged_cache(
    model: Any, batch: int, context: int, heads: tuple[int, int, int], device: str
) -> ResQCache:
    """A cache of one layer: `context` random tokens in pages, with room for one more token."""
    cache = ResQCache(model.config)
    layer = cache.layers[0]
    cache.batch.state = BatchState(context)
    layer.paged.pages = random_cache(batch, context + 1, heads, device)[0]
    layer.paged.pages_per_sequence = len(layer.paged.pages) // batch
    layer.paged.length = context
    return cache


def prepared(cache: ResQCache, batch: int, context: int) -> ForwardPass:
    """A pass over the cache that is the step behind `context` tokens, however often it is taken."""
    device = cache.layers[0].paged.held().device
    positions = torch.full((batch,), context, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return ForwardPass(AttentionMetadata(positions, None, positions.int() + 1, starts))


def compiled(tokens: Tokens, layers: Copies) -> Call:
    """The layer under torch.compile, as one graph, compared with the eager layer."""
    torch.compiler.reset()  # or each shape would count towards the limit of recompilations
    call = tokens.rotated(layers, torch.compile(run_layer, fullgraph=True, dynamic=False))
    expected = tokens.rotated(layers, run_layer)(0)
    if (error := float(graphs.errors(call(0), expected).max())) > TOLERANCE:
        raise RuntimeError(f"differs from the eager layer by {error:.2g} of the norm")
    return call


@torch.no_grad()
def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks every model's layer, then times prefill and decode of every context and batch.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch, context.
        missing: receives name -> reason for each alternative that cannot run.
    """
    for name in args.shapes:
        one_layer = partial(build, name, 1, bench.device, vocab_size=VOCABULARY)
        ours = one_layer(options=models.OPTIONS)
        if reason := why_wrong(ours):
            bench.failures.append(f"layer: {name}: {reason}")
            continue
        theirs = one_layer(options=None)
        for context in args.context:
            for batch in args.batch:
                for decodes in (False, True):
                    what = (name, ours, theirs, batch, context, decodes, missing)
                    yield from bench.attempted(partial(_rows, bench, *what))


def _rows(
    bench: BenchDevice,
    name: str,
    ours: Any,
    theirs: Any,
    batch: int,
    context: int,
    decodes: bool,
    missing: dict[str, str],
) -> list[Row]:
    heads, layer, floats = models.heads(name), ours.model.layers[0], theirs.model.layers[0]
    kind, new = ("decode", 1) if decodes else ("prefill", context)
    what = f"layer: {name} {kind} {batch}x{context}"
    tokens = Tokens.random(ours, batch, new, context if decodes else 0)
    cache = float_cache = None
    options: dict[str, Any] = {}
    if decodes:
        cache = paged_cache(ours, batch, context, heads, bench.device)
        options = {"forward_pass": prepared(cache, batch, context)}
        shape = (2, batch, heads[1], context, heads[2])
        keys, values = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
        float_cache = graphs.one_step_cache([(keys, values)])
        ordinary = run_layer(layer, tokens.hidden, tokens.rope, with_cache(layer, cache))
    layers = copies(bench, layer, cache, **options)
    candidates: dict[str, Call] = {"ours": tokens.rotated(layers, run_layer)}
    if decodes and not torch.equal(candidates["ours"](0), ordinary):
        raise RuntimeError(f"{what}: differs from an ordinary call")
    layers = copies(bench, floats, float_cache)
    candidates[BASELINE] = tokens.rotated(layers, run_layer)
    if bench.on_gpu:
        makers = [(COMPILED, partial(compiled, tokens, layers))]
        candidates |= bench.available(makers, missing)
        for key, call in candidates.items():
            replayed = cuda_timing.captured(call)(0)
            if (error := float(graphs.errors(replayed, call(0)).max())) > TOLERANCE:
                raise RuntimeError(f"{what}: {key}: as a graph it differs by {error:.2g}")
    size = models.shape(name)
    cached = kv_pages.token_bytes(heads[2]) * heads[1] * batch * (context + decodes)
    moved = weight_bytes(layer) + cached + 2 * nbytes(tokens.hidden)
    work = Work(
        op=f"layer_{kind}",
        place={"model": name, "layer": f"{kind} {context}", "batch": batch}
        | {"shape": [batch, context]},
        moved=moved,
        products=batch * new * sum(n * k for n, k in map(size.linear, LINEARS)),
    )
    return bench.rows(work, bench.alternate(candidates))
