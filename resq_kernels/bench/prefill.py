"""Attention of many new tokens over 4-bit pages: `nn.prefill.attend` against `ops.kv_attention`.

The crossover sets `prefill.KV_ATTENTION_TOKENS`. Every result is compared with `kv_attention`'s,
and its last row with float64 attention over the dequantized cache, before it is timed. The bound of
a row is the bytes of the pages, the queries and the result / bandwidth.

    resq bench prefill --shapes llama-3-8b --batch 1,8 --context 2048 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from resq_kernels import kv_pages, ops
from resq_kernels.bench import attention, models
from resq_kernels.bench.device import BenchDevice, Call, Row, Work
from resq_kernels.nn import prefill

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3-8b"], "batch": [1], "context": [2048]}
STEPS = (32, 64, 128, 256, 512)  # new tokens, up to the whole context


def agrees(out: torch.Tensor, direct: torch.Tensor) -> bool:
    """Whether every row agrees with kv_attention's to within two roundings to 16 bits."""
    error = (out.float() - direct.float()).norm(dim=-1)
    return bool((error <= attention.TOLERANCE * direct.float().norm(dim=-1)).all())


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, number of sequences, context and number of new tokens.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch, context (new tokens included).
        missing: receives name -> reason for each alternative that cannot run.
    """
    for model in args.shapes:
        for context in args.context:
            for batch in args.batch:
                for new in [step for step in STEPS if step < context] + [context]:
                    yield from bench.attempted(
                        partial(_rows, bench, model, batch, new, context, missing)
                    )


def _rows(
    bench: BenchDevice, model: str, batch: int, new: int, context: int, missing: dict[str, str]
) -> list[Row]:
    n_q, n_kv, head_dim = heads = models.heads(model)
    cache, table = attention.random_cache(batch, context, heads, bench.device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * new
    q = torch.randn(batch * new, n_q, head_dim, device=bench.device)  # as kv_append returns them
    lengths, scale = [(new, context)] * batch, head_dim**-0.5
    caches = bench.copies(cache)

    def ours(i: int) -> torch.Tensor:
        return prefill.attend(q, caches[i % len(caches)], table, lens, lengths, scale)

    def direct(i: int) -> torch.Tensor:
        where = (caches[i % len(caches)], table, lens, starts)
        return ops.kv_attention(q, *where, scale, out_dtype=torch.float16)

    out = ours(0)
    exact = attention.check(out, q, cache, table, context)
    if not (exact and agrees(out, direct(0))):
        raise RuntimeError(f"prefill: {model} {batch}x{new}/{context}: differs from the reference")
    dense = partial(_dense, bench, batch, new, context, heads)
    candidates: dict[str, Call] = {"ours": ours, "kv_attention": direct}
    candidates |= bench.available([("SDPA bf16", dense)], missing)
    place: Row = {"model": model, "layer": f"prefill {new}/{context}", "batch": batch}
    place["shape"] = [batch, new, context, *heads]
    moved = batch * context * n_kv * kv_pages.token_bytes(head_dim)
    moved += q.numel() * (4 + 2)
    return bench.rows(Work(op="prefill", place=place, moved=moved), bench.alternate(candidates))


def _dense(
    bench: BenchDevice, batch: int, new: int, context: int, heads: tuple[int, int, int]
) -> Call:
    """torch's attention on a dense BF16 cache."""
    n_q, n_kv, head_dim = heads
    q = torch.randn(batch, n_q, new, head_dim, device=bench.device, dtype=torch.bfloat16)
    shape = (2, batch, n_kv, context, head_dim)
    caches = bench.copies(torch.randn(shape, device=bench.device, dtype=torch.bfloat16))

    def call(i: int) -> torch.Tensor:
        k, v = caches[i % len(caches)]
        return scaled_dot_product_attention(
            q, k, v, causal_lower_right(new, context), enable_gqa=True
        )

    return call
