"""kv_dequantize: exactly the reference's values, zeros past the lengths, nothing read past them."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch
from forced_isa import ISAS, words_under
from kv_cases import DTYPES, HEAD_DIMS, Pages, fill_pages, hard_rows

from resq_kernels import ops, reference

LENGTHS = [1, 0, 130, 77]


def make(head_dim: int, page_size: int = 64, hi_bits: int = 8, n_kv: int = 3) -> Pages:
    """Rows of many magnitudes, with NaN, the largest numbers, and constant parts."""
    k, v = hard_rows(LENGTHS, n_kv, head_dim)
    v[3][7] = -3.7
    return fill_pages(k, v, page_size, hi_bits)


def run(pages: Pages, max_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    where = (pages.cache, pages.block_table, pages.seq_lens)
    return ops.kv_dequantize(*where, max_tokens, pages.head_dim, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_tokens", [130, 131, 200])
def test_values_are_the_reference_s(dtype: torch.dtype, head_dim: int, max_tokens: int) -> None:
    for page_size, hi_bits in ((64, 8), (32, 4), (128, 8)):
        pages = make(head_dim, page_size, hi_bits)
        where = (pages.cache, pages.block_table, pages.seq_lens)
        expected = reference.kv_dequantize(*where, max_tokens, head_dim, dtype)
        for out, rows in zip(run(pages, max_tokens, dtype), expected, strict=True):
            assert out.dtype == dtype and out.shape == (4, max_tokens, 3, head_dim)
            torch.testing.assert_close(out, rows, rtol=0, atol=0, equal_nan=True)
            assert not out.isinf().any()
            for i, length in enumerate(LENGTHS):
                assert not out[i, length:].view(torch.uint8).any()  # +0
        assert run(pages, max_tokens, dtype)[0].isnan().sum() > 0


def test_half_saturates_where_the_top_code_passes_the_largest_number() -> None:
    """The values of make() need it: without saturation they would be infinite."""
    pages = make(128)
    assert run(pages, 130, torch.float32)[0].nan_to_num(0).max() >= 65520
    assert run(pages, 130, torch.float16)[0].nan_to_num(0).max() == 65504


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sequences_share_pages(head_dim: int) -> None:
    pages = make(head_dim)
    table = pages.block_table[[2, 2, 2]].contiguous()
    lens = torch.tensor([130, 64, 5], dtype=torch.int32)
    k, v = ops.kv_dequantize(pages.cache, table, lens, 130, head_dim, torch.float32)
    whole = run(pages, 130, torch.float32)
    for out, rows in zip((k, v), whole, strict=True):
        for i, length in enumerate(lens.tolist()):
            expected = rows[2].where(torch.arange(130)[:, None, None] < length, 0.0)
            torch.testing.assert_close(out[i], expected, rtol=0, atol=0, equal_nan=True)


def test_one_code_more_is_another_value() -> None:
    pages = make(64)
    before = run(pages, 130, torch.float32)
    page = int(pages.block_table[2, 0])
    pages.cache[page, 0, 0] ^= 1  # the low nibble of one byte of K
    after = run(pages, 130, torch.float32)
    changed = (before[0] != after[0]) & ~before[0].isnan()
    assert changed.sum() == 1 and torch.equal(before[1].nan_to_num(), after[1].nan_to_num())


def test_empty() -> None:
    pages = make(64)
    assert run(pages, 130, torch.float16)[0][1].count_nonzero() == 0
    none = pages.block_table[:0], pages.seq_lens[:0]
    assert ops.kv_dequantize(pages.cache, *none, 8, 64, torch.float16)[0].shape == (0, 8, 3, 64)
    lens = torch.zeros(4, dtype=torch.int32)
    out = ops.kv_dequantize(pages.cache, pages.block_table, lens, 0, 64, torch.float16)
    assert out[1].shape == (4, 0, 3, 64)


def test_opcheck_and_compile() -> None:
    rows = [torch.randn(length, 3, 64) for length in LENGTHS]  # opcheck takes no NaN for equal
    pages = fill_pages(rows, rows, 64)
    arguments = (pages.cache, pages.block_table, pages.seq_lens, 130, 64, torch.float16)
    torch.library.opcheck(torch.ops.resq.kv_dequantize, arguments)
    compiled = torch.compile(ops.kv_dequantize, fullgraph=True, backend="aot_eager")
    for out, rows in zip(compiled(*arguments), ops.kv_dequantize(*arguments), strict=True):
        assert torch.equal(out, rows)


def test_refusals() -> None:
    pages = make(64)
    cache, table, lens = pages.cache, pages.block_table, pages.seq_lens
    long, missing = lens.clone(), table.clone()
    long[0], missing[3, 1] = -1, 99
    half = torch.float16
    wrong = [
        ((cache, table, lens, 130, 96, half), "head_dim: expected 64 or 128, got 96"),
        ((cache, table, lens, -1, 64, half), "max_tokens: expected 0 or more, got -1"),
        ((cache.char(), table, lens, 130, 64, half), "cache: expected uint8 .*got int8"),
        ((cache, table.long(), lens, 130, 64, half), "block_table: expected int32"),
        ((cache, table, lens[:3], 130, 64, half), r"seq_lens: expected int32 \[4\]"),
        ((cache, table, lens, 130, 64, torch.float64), "dtype: .*got float64"),
        ((cache, table, lens, 129, 64, half), "seq_lens: .* 0 to 129 .*130 for sequence 2"),
        ((cache, table, long, 130, 64, half), "seq_lens: .*-1 for sequence 0"),
        ((cache, missing, lens, 130, 64, half), "block_table: .*99 for a page of sequence 3"),
    ]
    for arguments, message in wrong:
        with pytest.raises(RuntimeError, match="kv_dequantize: " + message):
            ops.kv_dequantize(*arguments)


@functools.cache
def digest() -> str:
    torch.manual_seed(3)
    values = hashlib.sha256()
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for rows in run(make(head_dim), 150, dtype):
                values.update(rows.view(torch.uint8).numpy().tobytes())
    return values.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_the_same_on_every_isa(isa: str) -> None:
    assert words_under(isa, __file__) == [isa, digest()]


if __name__ == "__main__":
    print(torch.ops.resq.cpu_isa(), digest())
