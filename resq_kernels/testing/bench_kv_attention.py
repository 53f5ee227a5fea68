"""kv_attention beside torch's attention on a 16-bit cache: one decode step of several sequences.

Every result is compared with a float64 softmax over the dequantized cache before it is timed.
Caches are cold: each candidate rotates over copies of more than --cold-mb megabytes. The floor of
a row is the bytes of the tokens / measured bandwidth.

    resq bench attention --shapes llama-3-8b --batch 1,8 --context 4096 --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn import functional

from resq_kernels import kv_pages, ops
from resq_kernels.testing import timing
from resq_kernels.testing.bench_mixed_gemm import copies

# name -> (query heads, key and value heads, head_dim)
HEADS = {
    "llama-3.2-1b": (32, 8, 64),
    "llama-3-8b": (32, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "qwen2.5-7b": (28, 4, 128),
}
PAGE_SIZE = kv_pages.DEFAULT_PAGE_SIZE
TOLERANCE = 1e-3  # of the output's norm; 4-bit quantization itself moves it by some 5e-2


def random_cache(
    batch: int, context: int, heads: tuple[int, int, int], device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages that hold `batch` sequences of `context` random tokens, and their block table."""
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
    """Slots of the tokens of a sequence with these pages, int64 [context]."""
    places = torch.arange(PAGE_SIZE, device=pages.device)
    return (pages.long()[:, None] * PAGE_SIZE + places).view(-1)[:context]


def decoder(batch: int, context: int, device: str = "cpu") -> Callable[..., torch.Tensor]:
    """A function of (q, cache, table): one query a sequence over all its tokens."""
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return lambda q, cache, table: ops.kv_attention(
        q, cache, table, lengths, starts, q.shape[-1] ** -0.5
    )


def check(
    out: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, context: int
) -> bool:
    """Whether the last sequence's output is that of float64 attention over its own cache."""
    head_dim = q.shape[-1]
    slots = token_slots(table[-1], context)
    k, v = (rows.dequantize().double() for rows in kv_pages.read_tokens(cache, slots, head_dim))
    group = q.shape[1] // k.shape[1]
    k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    scores = torch.einsum("hd,thd->ht", q[-1].double(), k) * head_dim**-0.5
    expected = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
    return bool((out[-1].double() - expected).norm() <= TOLERANCE * expected.norm())


def baselines(
    batch: int, context: int, heads: tuple[int, int, int], cold_bytes: int
) -> dict[str, Callable[[int], object]]:
    """torch's attention on dense caches, each over its own cold copies.

    "grouped" passes the heads that share keys as rows of one query matrix: the best that a user can
    make of it for a decode step, where no mask is needed.
    """
    n_q, n_kv, head_dim = heads
    found: dict[str, Callable[[int], object]] = {}
    attention = functional.scaled_dot_product_attention
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        q = torch.randn(batch, n_q, 1, head_dim).to(dtype)
        grouped = q.view(batch, n_kv, n_q // n_kv, head_dim)
        cached = copies(torch.randn(2, batch, n_kv, context, head_dim).to(dtype), cold_bytes)
        found[f"SDPA {name}"] = lambda i, q=q, c=cached: attention(*_with(q, c, i), enable_gqa=True)
        found[f"SDPA {name} grouped"] = lambda i, q=grouped, c=cached: attention(*_with(q, c, i))
    return found


def _with(q: torch.Tensor, cached: list[torch.Tensor], i: int) -> tuple[torch.Tensor, ...]:
    return q, *cached[i % len(cached)]


def bench(
    model: str, batch: int, context: int, bandwidth: float, args: argparse.Namespace
) -> list[dict[str, object]]:
    """One row per baseline for one model's heads, number of sequences and context."""
    heads, cold_bytes = HEADS[model], args.cold_mb * 2**20
    n_q, n_kv, head_dim = heads
    cache, table = random_cache(batch, context, heads)
    decode = decoder(batch, context)
    q = torch.randn(batch, n_q, head_dim, dtype=torch.bfloat16)
    caches = copies(cache, cold_bytes)

    def ours(i: int) -> torch.Tensor:
        return decode(q, caches[i % len(caches)], table)

    q_float = q.float()
    if not check(decode(q_float, cache, table), q_float, cache, table, context):
        raise RuntimeError(f"kv_attention: {model} {batch}x{context}: differs from the reference")
    others = baselines(batch, context, heads, cold_bytes)
    clock = timing.clock_of(args.cpu_time)
    times = timing.alternate({"ours": ours, **others}, args.rounds, clock=clock)
    moved = batch * context * n_kv * kv_pages.token_bytes(head_dim)
    floor, mine = moved / bandwidth * 1e6, times["ours"]
    return [
        {
            "op": "kv_attention",
            "model": model,
            "shape": [batch, context, n_q, n_kv, head_dim],
            **timing.against(mine, name, times[name]),
            "bytes_floor_us": round(floor, 1),
            "ceiling_share": round(floor / mine.median_us, 3),
            "checked": True,
        }
        for name in others
    ]


def run(args: argparse.Namespace) -> dict[str, object]:
    """Checks, times and prints every row.

    Args:
        args: the options of `resq bench`.

    Returns:
        machine, limits and rows, as docs/cli.md lists them.

    Raises:
        RuntimeError: a result differs from the reference.
    """
    torch.manual_seed(0)
    bandwidth = timing.read_bandwidth(clock=timing.clock_of(args.cpu_time))
    print(f"memory {bandwidth / 1e9:.1f} GB/s")
    print(
        "model           sequences x tokens  floor us   ours us  share"
        "  baseline                  us  ratio"
    )
    rows: list[dict[str, object]] = []
    for model in args.shapes or ["llama-3-8b"]:
        for batch in args.batch or [1, 8]:
            for context in args.context:
                for row in bench(model, batch, context, bandwidth, args):
                    rows.append(row)
                    print(
                        f"{model:16}{batch:9} x {context:6}{row['bytes_floor_us']:10.0f}"
                        f"{row['ours_us']:10.0f}{row['ceiling_share']:7.0%}  {row['baseline']:18}"
                        f"{row['baseline_us']:10.0f}{row['ratio']:7.2f}",
                        flush=True,
                    )
    limits = {"read_bytes_per_second": bandwidth}
    return {"machine": timing.machine(args.cpu_time), "limits": limits, "rows": rows}
