"""kv_dequantize on CUDA: exactly the values of the CPU's operator."""

from __future__ import annotations

import emulation
import pytest
import torch
from kv_cases import DTYPES, HEAD_DIMS, fill_pages, hard_rows

from resq_kernels import ops

LENGTHS = [1, 0, 70, 33]


def arguments(head_dim: int, page_size: int = 32, n_kv: int = 3) -> tuple[torch.Tensor, ...]:
    k, v = hard_rows(LENGTHS, n_kv, head_dim)
    pages = fill_pages(k, v, page_size)
    return pages.cache, pages.block_table, pages.seq_lens


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_cpu_s(
    device: emulation.Emulated, dtype: torch.dtype, head_dim: int
) -> None:
    for page_size, max_tokens in ((32, 70), (64, 71), (128, 100)):
        call = (*arguments(head_dim, page_size), max_tokens, head_dim, dtype)
        for out, rows in zip(device.kv_dequantize(*call), ops.kv_dequantize(*call), strict=True):
            torch.testing.assert_close(out, rows, rtol=0, atol=0, equal_nan=True)
            for i, length in enumerate(LENGTHS):
                assert not out[i, length:].view(torch.uint8).any()


def test_nothing(device: emulation.Emulated) -> None:
    cache, table, lens = arguments(64)
    half = torch.float16
    assert device.kv_dequantize(cache, table[:0], lens[:0], 9, 64, half)[0].shape == (0, 9, 3, 64)
    assert device.kv_dequantize(cache, table, lens * 0, 0, 64, half)[1].shape == (4, 0, 3, 64)


@pytest.mark.parametrize("what", ["long", "negative", "page"])
def test_stops_at_what_does_not_fit(sm80: emulation.Emulated, what: str) -> None:
    cache, table, lens = arguments(64)
    if what == "page":
        table[2, 1] = cache.shape[0]
    else:
        lens[2] = {"long": 71, "negative": -1}[what]
    with emulation.stopped_by_trap():
        sm80.kv_dequantize(cache, table, lens, 70, 64, torch.float16)


def test_refuses_before_any_launch(device: emulation.Emulated) -> None:
    cache, table, lens = arguments(64)
    slice_ = torch.zeros(cache.numel() + 1, dtype=torch.uint8)[1:].view(cache.shape)
    wrong = [
        ((cache, table, lens, 70, 96, torch.float16), "head_dim: expected 64 or 128"),
        ((cache, table, lens, 70, 64, torch.int32), "dtype: expected float32"),
        ((slice_, table, lens, 70, 64, torch.float16), "cache: expected memory aligned"),
    ]
    for call, message in wrong:
        with pytest.raises(RuntimeError, match="kv_dequantize: " + message):
            device.kv_dequantize(*call)
