"""kv_attention on a GPU beside torch's attention on a BF16 cache; called by bench_cuda."""

from __future__ import annotations

import torch
from torch.nn import functional

from resq_kernels.testing import cuda_timing
from resq_kernels.testing.bench_kv_attention import decoder, random_cache

CELLS = ((1, 1024), (1, 32768), (8, 8192), (8, 32768), (64, 8192))  # sequences, tokens of each
TOLERANCE = 2e-2  # of the output's norm: BF16 rounds it by 2e-3, one page too many moves it more


def agrees(
    out: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, context: int
) -> bool:
    """Whether the last sequence's output is that of the CPU's operator on its own pages."""
    own = cache[table[-1].long()].cpu()
    order = torch.arange(len(own), dtype=torch.int32)[None]
    expected = decoder(1, context, "cpu")(q[-1:].cpu(), own, order).double()
    return bool((out[-1:].cpu().double() - expected).norm() <= TOLERANCE * expected.norm())


def times(
    heads: tuple[int, int, int], batch: int, context: int, device: str = "cuda"
) -> dict[str, object]:
    """Microseconds of a decode step: "resq", and "bf16" with a group's heads as query rows.

    Raises:
        RuntimeError: the output is not that of the CPU's operator.
    """
    n_q, n_kv, head_dim = heads
    cache, table = random_cache(batch, context, heads, device)
    q = torch.randn(batch, n_q, head_dim, device=device, dtype=torch.bfloat16)
    decode = decoder(batch, context, device)
    if not agrees(decode(q, cache, table), q, cache, table, context):
        raise RuntimeError(f"kv_attention: {batch} x {context}: the result is not that of the CPU")
    caches = [cache] + [cache.clone() for _ in range(cuda_timing.copies(cache.numel()) - 1)]
    dense = [
        torch.randn(2, batch, n_kv, context, head_dim, device=device).bfloat16()
        for _ in range(cuda_timing.copies(4 * batch * n_kv * context * head_dim))
    ]
    grouped = q.view(batch, n_kv, n_q // n_kv, head_dim)
    return cuda_timing.alternate(
        {
            "resq": lambda i: decode(q, caches[i % len(caches)], table),
            "bf16": lambda i: functional.scaled_dot_product_attention(
                grouped, *dense[i % len(dense)]
            ),
        }
    )
