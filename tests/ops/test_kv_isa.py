"""kv_append and kv_attention have the same bits on every instruction set."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch
from forced_isa import ISAS, words_under
from kv_cases import DTYPES, HEAD_DIMS, cos_sin, fill_pages, rotated_queries

from resq_kernels import kv_pages, ops


@functools.cache
def digests() -> tuple[str, str]:
    """Hashes of pages written in every dtype and mode, and of decode, prefill and long contexts."""
    torch.manual_seed(3)
    pages, outputs = hashlib.sha256(), hashlib.sha256()
    for head_dim in HEAD_DIMS:
        lengths, counts = [1, 200, 77, 1100], [1, 130, 1, 2]
        for dtype in DTYPES:
            for hi_bits, matrices in ((8, 1), (4, 2), (8, 2)):
                k, v = (torch.randn(45, 2, head_dim).to(dtype) for _ in "kv")
                k *= torch.exp2(torch.randint(-20, 12, (45, 2, 1)))
                cache = torch.zeros(kv_pages.cache_shape(2, 2, 32, head_dim), dtype=torch.uint8)
                cos, sin = cos_sin(45, head_dim)
                rotation = torch.randn(matrices, head_dim, head_dim)
                slots, q = torch.randperm(64)[:45], torch.randn(45, 6, head_dim).to(dtype)
                rotated = ops.kv_append(k, v, cos, sin, rotation, cache, slots, hi_bits, q)
                pages.update(cache.numpy().tobytes() + rotated.numpy().tobytes())

            rows = [[torch.randn(length, 2, head_dim) for length in lengths] for _ in "kv"]
            filled = fill_pages(*rows, 64)
            rest = (*cos_sin(sum(counts), head_dim), torch.randn(2, head_dim, head_dim) / 8)
            q = torch.randn(sum(counts), 6, head_dim).to(dtype)
            where = (
                filled.cache,
                filled.block_table,
                filled.seq_lens,
                torch.tensor([0, *counts]).cumsum(0).int(),
                0.1,
            )
            for queries in (q, rotated_queries(q, 2, *rest)[0]):
                out = ops.kv_attention(queries, *where, dtype)
                outputs.update(out.view(torch.uint8).numpy().tobytes())
    return pages.hexdigest(), outputs.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kv_ops_have_the_same_bits_on_every_isa(isa: str) -> None:
    assert words_under(isa, __file__) == [isa, *digests()]


if __name__ == "__main__":
    print(torch.ops.resq.cpu_isa(), *digests())
