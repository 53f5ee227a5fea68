"""How kv_attention on CUDA cuts rows into splits, and when it raises their maxima."""

from __future__ import annotations

import emulation
import pytest
import torch
from gemm_cases import forced
from kv_cases import HEAD_DIMS, fill_pages
from test_cuda_kv_attention import make


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 30, 2]], ids=["decode", "chunks"])
def test_a_block_table_wider_than_the_lengths_costs_nothing(
    device: emulation.Emulated, counts: list[int]
) -> None:
    """The same items and the same states: not an instruction more."""
    case = make([2100, 70, 1100], counts, 64, n_kv=2)
    outs, work = [], []
    for times in (1, 2000):  # 2.2 million tokens
        table = torch.cat([case.pages.block_table] * times, dim=1)
        emulator = emulation.emulator()
        emulator.take_counters()
        with emulator.options(count="on"):
            outs.append(case.run(device, block_table=table))
        counters = ("grid", "thread_instructions", "global_load_bytes", "global_store_bytes")
        work.append([[launch[name] for name in counters] for launch in emulator.take_counters()])
    assert torch.equal(outs[0], outs[1])
    assert work[0] == work[1] and len(work[0]) == 2


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_maxima_that_rise_with_every_token(
    device: emulation.Emulated, head_dim: int, slope: float
) -> None:
    """Scores rise by `slope` a token (log2) for one head and fall for the other.

    A maximum is raised in steps of 8. Whether one is depends on no other row.
    """
    length = 300
    case = make([length], [3], head_dim, group=2, scale=1.0)
    ramp = torch.arange(length)[:, None] * slope / 1.4427
    case.k[0][:, 0] *= 0.05
    case.k[0][:, 0, :1] += ramp
    case.pages = fill_pages(case.k, case.v, 64)
    case.q[:] = torch.randn_like(case.q) * 0.3
    case.q[:, 0, 0], case.q[:, 1, 0] = 1.0, -1.0
    out = case.check(device)
    for head in range(2):
        alone = case.run(device, q=case.q[:, head : head + 1].contiguous())
        assert torch.equal(alone, out[:, head : head + 1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_of_one_sequence_on_both_sides_of_a_tier(
    device: emulation.Emulated, head_dim: int
) -> None:
    """Rows that see up to 2048 tokens have splits of 256, the others of 512.

    Each has the bits that it has alone, with states and without.
    """
    counts = [40, 1, 3]
    case = make([2060, 300, 2049], counts, head_dim, group=4)
    out = case.check(device)
    for choice in ("splits=some", "splits=whole"):
        with forced(device, "kv_attention", choice):
            assert torch.equal(case.run(device), out), choice
    for query in (0, 27, 28, 39):
        alone = case.run(
            device,
            q=case.q[query : query + 1].contiguous(),
            block_table=case.pages.block_table[:1].contiguous(),
            seq_lens=torch.tensor([2060 - 39 + query], dtype=torch.int32),
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
        )
        assert torch.equal(alone[0], out[query]), query
