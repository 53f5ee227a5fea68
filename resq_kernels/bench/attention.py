"""kv_attention compared with torch's attention on a 16-bit cache: a decode step of some sequences.

Every result is compared with float64 attention over the dequantized cache before it is timed.
Caches are cold: each candidate rotates over copies of them. The bound of a row is the bytes of the
cached tokens / measured bandwidth. --table-width makes block tables wider than the sequences, as
inference servers have them.

    resq bench attention --shapes llama-3-8b --batch 1,8 --context 4096 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from resq_kernels import kv_pages, ops
from resq_kernels.bench import models
from resq_kernels.bench.device import BenchDevice, Call, Row, Work
from resq_kernels.reference.kv_pages import read_tokens

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3-8b"], "batch": [1, 8], "context": [4096], "table_width": [1]}
PAGE_SIZE = kv_pages.DEFAULT_PAGE_SIZE
# Relative to the norm of the output. Rounding to BF16 costs 2e-3, a scale that is 2 % off 2e-2. The
# 5e-2 or so of 4-bit quantization do not count: the check reads the same dequantized cache.
TOLERANCE = 5e-3


def random_cache(
    batch: int, context: int, heads: tuple[int, int, int], device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of `batch` sequences of `context` random tokens, and its block table."""
    _, n_kv, head_dim = heads
    pages = -(-context // PAGE_SIZE)
    shape = kv_pages.cache_shape(batch * pages, n_kv, PAGE_SIZE, head_dim)
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    for sequence in table:
        k, v = torch.randn(2, context, n_kv, head_dim, device=device)
        ops.kv_append(k, v, None, None, None, cache, token_slots(sequence, context))
    return cache, table


def token_slots(pages: torch.Tensor, context: int) -> torch.Tensor:
    """Slots of the tokens of a sequence that owns these pages, int64 [context]."""
    places = torch.arange(PAGE_SIZE, device=pages.device)
    return (pages.long().unsqueeze(1) * PAGE_SIZE + places).view(-1).narrow(0, 0, context)


def decoder(batch: int, context: int, device: str = "cpu") -> Callable[..., torch.Tensor]:
    """A function of (q, cache, table): one query of each sequence over all its tokens."""
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return lambda q, cache, table: ops.kv_attention(
        q, cache, table, lengths, starts, q.shape[-1] ** -0.5
    )


def check(
    out: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, context: int
) -> bool:
    """Whether the last sequence's output agrees with float64 attention over its pages."""
    head_dim = q.shape[-1]
    pages = cache[table[-1].long()].cpu()
    slots = token_slots(torch.arange(len(pages)), context)
    k, v = (rows.dequantize().double() for rows in read_tokens(pages, slots, head_dim))
    group = q.shape[1] // k.shape[1]
    k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    scores = torch.einsum("hd,thd->ht", q[-1].cpu().double(), k) * head_dim**-0.5
    expected = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
    return bool((out[-1].cpu().double() - expected).norm() <= TOLERANCE * expected.norm())


def baselines(
    bench: BenchDevice, batch: int, context: int, heads: tuple[int, int, int]
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names of torch's attention on dense caches and functions that set each up, on cold copies.

    "grouped" passes the query heads that share a kv head as rows of one query matrix: the fastest
    way to call SDPA in a decode step, which needs no mask.
    """
    dtypes = {"bf16": torch.bfloat16}
    if not bench.on_gpu:
        dtypes["fp32"] = torch.float32  # faster than bf16 on CPUs without BF16 instructions
    for name, dtype in dtypes.items():
        make = partial(_dense, bench, batch, context, heads, dtype)
        yield f"SDPA {name}", partial(make, grouped=False)
        yield f"SDPA {name} grouped", partial(make, grouped=True)


def _dense(
    bench: BenchDevice,
    batch: int,
    context: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    grouped: bool,
) -> Call:
    n_q, n_kv, head_dim = heads
    shape = (batch, n_kv, n_q // n_kv, head_dim) if grouped else (batch, n_q, 1, head_dim)
    q = torch.randn(shape, device=bench.device, dtype=dtype)
    dense = torch.randn(2, batch, n_kv, context, head_dim, device=bench.device, dtype=dtype)
    caches, attention = bench.copies(dense), functional.scaled_dot_product_attention

    def call(i: int) -> torch.Tensor:
        k, v = caches[i % len(caches)]
        return attention(q, k, v, enable_gqa=not grouped)

    return call


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, number of sequences, context and baseline.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch, context, table_width.
        missing: receives name -> reason for each baseline that cannot run.
    """
    for model in args.shapes:
        for context in args.context:
            for batch in args.batch:
                for width in args.table_width:
                    yield from bench.attempted(
                        partial(_rows, bench, model, batch, context, width, missing)
                    )


def _rows(
    bench: BenchDevice,
    model: str,
    batch: int,
    context: int,
    table_width: int,
    missing: dict[str, str],
) -> list[Row]:
    n_q, n_kv, head_dim = heads = models.heads(model)
    cache, table = random_cache(batch, context, heads, bench.device)
    table = functional.pad(table, (0, table.shape[1] * (table_width - 1)))
    decode = decoder(batch, context, bench.device)
    q = torch.randn(batch, n_q, head_dim, dtype=torch.bfloat16, device=bench.device)
    if not check(decode(q, cache, table), q, cache, table, context):
        raise RuntimeError(f"kv_attention: {model} {batch}x{context}: differs from the reference")
    caches = bench.copies(cache)
    candidates: dict[str, Call] = {"ours": lambda i: decode(q, caches[i % len(caches)], table)}
    candidates |= bench.available(baselines(bench, batch, context, heads), missing)
    layer = f"decode {context}" + (f" table x{table_width}" if table_width > 1 else "")
    place: Row = {"model": model, "layer": layer, "batch": batch}
    place["shape"] = [batch, context, *heads]
    moved = batch * context * n_kv * kv_pages.token_bytes(head_dim)
    work = Work(op="kv_attention", place=place, moved=moved)
    return bench.rows(work, bench.alternate(candidates))
