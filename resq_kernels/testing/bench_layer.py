"""One decoder layer of a model, quantized and in BF16: a decode step and a prefill.

Ours is the layer as a loaded model has it: norms that quantize, merged projections, 4-bit pages.
Beside it the BF16 layer of transformers, on a GPU also under torch.compile. A one-layer model is
checked as `resq bench model` checks a whole one; then every timed call of ours is compared with
an ordinary call of the layer, and the compiled layer with the eager one. Weights and caches are
cold: calls go through several copies of the layer. On a GPU all are CUDA graphs.

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
from resq_kernels.nn.decode_graph import PreparedSequences
from resq_kernels.nn.kv_cache import ResQCache
from resq_kernels.nn.paged import Sequences, Step
from resq_kernels.testing import bench_graphs, bench_model, bench_models, cuda_timing
from resq_kernels.testing.bench_device import BenchDevice, Call, Row, Work, nbytes
from resq_kernels.testing.bench_kv_attention import random_cache

MODELS = bench_models.names()
DEFAULTS = {"shapes": ["llama-3.2-1b"], "batch": [1], "context": [128]}
BASELINE, COMPILED = "transformers bf16", "torch.compile bf16"
Copies = list[tuple[Any, dict[str, Any]]]  # layers, each with its own cache as arguments
VOCABULARY = 512  # of the model that the layer is taken from: for the check alone
TOLERANCE = 2e-2  # of the norm of a token: what BF16 rounds differently where operators are fused


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
        """`new` tokens of every sequence behind `context` others."""
        shape = (batch, new, model.config.hidden_size)
        hidden = torch.randn(shape, dtype=torch.bfloat16, device=model.device)
        positions = torch.arange(context, context + new, device=model.device).expand(batch, new)
        return cls(hidden, model.model.rotary_emb(hidden, positions))

    def rotated(self, copies: Copies, run: Callable[..., torch.Tensor]) -> Call:
        """The call that takes the copies in turn; each has been called once when this returns."""
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
    """[B, L, K] of hidden [B, L, K]; the options are `with_cache`'s."""
    return layer(hidden, position_embeddings=rope, **options)


def with_cache(layer: Any, cache: Any) -> dict[str, Any]:
    """A cache as arguments of a layer; without one, keys and values live as long as the call."""
    return {} if cache is None else bench_model.given(layer, cache)


def copies(bench: BenchDevice, layer: Any, cache: Any) -> Copies:
    """The layer and its cache, often enough that a round trip leaves nothing in the caches."""
    size = bench_model.weight_bytes(layer)
    size += 0 if cache is None else bench_model.cache_bytes(cache)
    found = [(layer, with_cache(layer, cache))]
    for _ in range(bench.copy_count(size) - 1):
        other = copy.deepcopy(layer)
        found.append((other, with_cache(other, copy.deepcopy(cache))))
    return found


def paged_cache(
    model: Any, batch: int, context: int, heads: tuple[int, int, int], device: str
) -> ResQCache:
    """A cache of one layer: `context` random tokens in pages, and room for one more."""
    cache = ResQCache(model.config)
    layer = cache.layers[0]
    layer.sequences = Sequences(context)
    layer.paged.pages = random_cache(batch, context + 1, heads, device)[0]
    layer.paged.pages_per_sequence = len(layer.paged.pages) // batch
    layer.paged.crop(context)
    return cache


def prepared(model: Any, cache: ResQCache, batch: int, context: int) -> ResQCache:
    """The same pages, of which every step is the one behind `context` tokens."""
    view, paged = ResQCache(model.config), cache.layers[0].paged
    positions = torch.full((batch,), context, device=paged.pages.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=paged.pages.device)
    sequences = PreparedSequences()
    sequences.step = Step(positions, None, positions.int() + 1, starts, context + 1)
    view.layers[0].sequences, view.layers[0].paged = sequences, paged
    return view


def compiled(tokens: Tokens, layers: Copies) -> Call:
    """The layer under torch.compile, as one graph, compared with the eager layer."""
    torch.compiler.reset()  # another shape is not a recompilation, of which there is a limit
    call = tokens.rotated(layers, torch.compile(run_layer, fullgraph=True, dynamic=False))
    expected = tokens.rotated(layers, run_layer)(0)
    if (error := float(bench_graphs.errors(call(0), expected).max())) > TOLERANCE:
        raise RuntimeError(f"differs from the eager layer by {error:.2g} of the norm")
    return call


@torch.no_grad()
def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks every model's layer, then times prefill and decode of every context and batch.

    Args:
        bench: the device.
        args: the options of `resq bench`: shapes, batch, context.
        missing: gets name -> reason for each alternative that cannot run.

    Raises:
        RuntimeError: a result differs from the reference, or a call from the ordinary one.
    """
    for name in args.shapes:
        build = partial(bench_model.build, name, 1, bench.device, vocab_size=VOCABULARY)
        ours = build(quantized=True)
        if reason := bench_model.why_wrong(ours):
            raise RuntimeError(f"layer: {name}: {reason}")
        theirs = build(quantized=False)
        for context in args.context:
            for batch in args.batch:
                for decodes in (False, True):
                    yield from _rows(bench, name, ours, theirs, batch, context, decodes, missing)


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
    heads, layer, floats = bench_models.heads(name), ours.model.layers[0], theirs.model.layers[0]
    kind, new = ("decode", 1) if decodes else ("prefill", context)
    what = f"layer: {name} {kind} {batch}x{context}"
    tokens = Tokens.random(ours, batch, new, context if decodes else 0)
    cache = float_cache = None
    if decodes:
        pages = paged_cache(ours, batch, context, heads, bench.device)
        cache = prepared(ours, pages, batch, context)
        shape = (2, batch, heads[1], context, heads[2])
        keys, values = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
        float_cache = bench_graphs.one_step_cache([(keys, values)])
        ordinary = run_layer(layer, tokens.hidden, tokens.rope, with_cache(layer, pages))
    candidates: dict[str, Call] = {"ours": tokens.rotated(copies(bench, layer, cache), run_layer)}
    if decodes and not torch.equal(candidates["ours"](0), ordinary):
        raise RuntimeError(f"{what}: differs from an ordinary call")
    layers = copies(bench, floats, float_cache)
    candidates[BASELINE] = tokens.rotated(layers, run_layer)
    if bench.on_gpu:
        makers = [(COMPILED, partial(compiled, tokens, layers))]
        candidates |= bench.available(makers, missing)
        for key, call in candidates.items():
            replayed = cuda_timing.captured(call)(0)
            if (error := float(bench_graphs.errors(replayed, call(0)).max())) > TOLERANCE:
                raise RuntimeError(f"{what}: {key}: as a graph it differs by {error:.2g}")
    size = bench_models.shape(name)
    cached = kv_pages.token_bytes(heads[2]) * heads[1] * batch * (context + decodes)
    moved = bench_model.weight_bytes(layer) + cached + 2 * nbytes(tokens.hidden)
    work = Work(
        op=f"layer_{kind}",
        place={"model": name, "layer": f"{kind} {context}", "batch": batch}
        | {"shape": [batch, context]},
        moved=moved,
        products=batch * new * sum(n * k for n, k in map(size.linear, LINEARS)),
    )
    return bench.rows(work, bench.alternate(candidates))
