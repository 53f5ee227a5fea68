"""Sizes that the kernels' 32-bit counters do not hold are refused, on every device alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resq_kernels import kv_pages, ops

MANY = 2**31
NO_COLUMNS = torch.empty(MANY, 0)  # rows that take no memory
TABLE = torch.zeros(1, 1, dtype=torch.int32)


ROWS: dict[str, Callable[[], object]] = {
    "mixed_quantize: x": lambda: ops.mixed_quantize(NO_COLUMNS, 0),
    "rms_norm_quantize: x": lambda: ops.rms_norm_quantize(NO_COLUMNS, None, None, 1e-5, 0),
    "rms_norm: x": lambda: ops.rms_norm(NO_COLUMNS, None, 1e-5),
    "silu_mul_hadamard_quantize: gate_up": lambda: ops.silu_mul_hadamard_quantize(
        NO_COLUMNS, False
    ),
}


@pytest.mark.parametrize("argument", ROWS)
def test_rows_are_numbered_in_32_bits(argument: str) -> None:
    message = rf"^{argument}: expected fewer than 2\^31 rows, got 2147483648$"
    with pytest.raises(RuntimeError, match=message):
        ROWS[argument]()


def test_columns_are_numbered_in_32_bits(tmp_path: Path) -> None:
    halves = torch.from_file(str(tmp_path / "row"), True, MANY, dtype=torch.float16)
    message = r"^mixed_quantize: x: expected fewer than 2\^31 columns, got 2147483648$"
    with pytest.raises(RuntimeError, match=message):
        ops.mixed_quantize(halves.view(1, MANY), 0)


def test_tokens_times_heads_are_numbered_in_32_bits(tmp_path: Path) -> None:
    one = torch.from_file(str(tmp_path / "q"), True, MANY * 64, dtype=torch.float16)
    cache = torch.zeros(kv_pages.cache_shape(1, 1, 32, 64), dtype=torch.uint8)
    starts = torch.zeros(2, dtype=torch.int32)
    message = r"^kv_attention: q: expected fewer than 2\^31 tokens x heads, got 2147483648$"
    with pytest.raises(RuntimeError, match=message):
        q = one.view(MANY // 4, 4, 64)
        ops.kv_attention(q, cache, TABLE, TABLE[0], starts, 0.1)


def test_bytes_of_a_page_are_numbered_in_32_bits(tmp_path: Path) -> None:
    tile = kv_pages.cache_shape(1, 1, 32, 64)[2]
    count = -(-MANY // tile) * tile
    cache = torch.from_file(str(tmp_path / "cache"), True, count, dtype=torch.uint8)
    message = r"^kv_dequantize: cache: expected fewer than 2\^31 bytes of a head's page, got"
    with pytest.raises(RuntimeError, match=message):
        ops.kv_dequantize(cache.view(1, 1, count), TABLE, TABLE[0], 1, 64, torch.float16)
