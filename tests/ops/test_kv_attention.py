"""kv_attention against float64 attention over the dequantized pages, within derived bounds."""

from __future__ import annotations

import pytest
import torch
from kv_bounds import kv_attention_bound
from kv_cases import (
    DTYPES,
    HEAD_DIMS,
    Pages,
    cos_sin,
    fill_pages,
    page_slots,
    rotated_queries,
    rotations,
)
from torch._inductor.utils import fresh_cache

from resq_kernels import kv_pages, ops, reference
from resq_kernels.formats import join_heads
from resq_kernels.reference.attention import attend, rope
from resq_kernels.reference.kv_pages import read_tokens


def random_pages(
    lengths: list[int], n_kv: int, head_dim: int, page_size: int = 64, hi_bits: int = 8
) -> Pages:
    rows = [[torch.randn(length, n_kv, head_dim) for length in lengths] for _ in "kv"]
    return fill_pages(rows[0], rows[1], page_size, hi_bits)


def starts(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def check(pages: Pages, q, counts, scale, exact_q=None, out_dtype=None) -> torch.Tensor:
    """Runs the op, compares with float64 within the bound, returns the output.

    `exact_q` is what `q` stands for, where that is rounded already.
    """
    query_starts = starts(counts)
    arguments = (pages.block_table, pages.seq_lens, query_starts, scale, out_dtype)
    out = ops.kv_attention(q, pages.cache, *arguments)
    assert out.shape == q.shape and out.dtype == (out_dtype or q.dtype)
    exact_q = q.double() if exact_q is None else exact_q
    for i in range(len(counts)):
        rows = slice(int(query_starts[i]), int(query_starts[i + 1]))
        k, v = pages.rows(i)
        if len(k) == 0:
            assert (out[rows] == 0).all()
            continue
        slots = page_slots(pages.block_table[i], pages.page_size, len(k))
        codes_v = read_tokens(pages.cache, slots, pages.head_dim)[1].codes.double()
        expected = attend(exact_q[rows], k, v, scale)
        bound = kv_attention_bound(exact_q[rows], k, v, codes_v, scale)
        # q' of kv_append, a float32 sum, differs from the exact one by at most this.
        rounding = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
        bound += rounding[out.dtype] * expected.abs() + 2.0**-24
        error = (out[rows].double() - expected).abs()
        assert (error <= bound).all(), (i, (error / bound).max())
    assert (out[int(query_starts[-1]) :] == 0).all()
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hi_bits", [8, 4])
def test_kv_attention_is_float64_attention_over_the_pages(
    dtype: torch.dtype, head_dim: int, hi_bits: int
) -> None:
    lengths, counts = [1, 37, 64, 200, 0, 65, 130], [1, 37, 5, 3, 0, 66, 1]
    pages = random_pages(lengths, 2, head_dim, hi_bits=hi_bits)
    tokens = sum(counts) + 2  # two rows of padding
    check(pages, torch.randn(tokens, 4, head_dim).to(dtype), counts, head_dim**-0.5)
    cos, sin = (angles.to(dtype) for angles in cos_sin(tokens, head_dim))
    for rotation in (None, rotations(1, head_dim), rotations(2, head_dim).half()):
        q = torch.randn(tokens, 4, head_dim).to(dtype)
        q, exact = rotated_queries(q, 2, cos, sin, rotation)
        check(pages, q, counts, head_dim**-0.5, exact, dtype)


@pytest.mark.parametrize("group", range(1, 9))
def test_kv_attention_of_every_group_size(group: int) -> None:
    pages = random_pages([90, 17], 2, 64, page_size=32)
    check(pages, torch.randn(80, 2 * group, 64), [70, 10], 0.125)


def test_kv_attention_of_one_head_for_many() -> None:
    pages = random_pages([50], 1, 64)
    check(pages, torch.randn(3, 71, 64), [3], 0.125)  # more heads than a task has rows


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, -0.125])
def test_kv_attention_from_flat_to_peaky(scale: float) -> None:
    pages = random_pages([300], 1, 128)
    check(pages, torch.randn(4, 2, 128), [4], scale)


def test_kv_attention_is_flat_over_a_long_context() -> None:
    length = 20_000
    pages = random_pages([length], 1, 64)
    v = pages.rows(0)[1]
    out = ops.kv_attention(
        torch.randn(1, 1, 64), pages.cache, pages.block_table, pages.seq_lens, starts([1]), 0.0
    )
    # Equal weights: what remains is the rounding of the 313 block sums.
    assert (out[0].double() - v.mean(0)).abs().max() < 2e-6
    check(pages, torch.randn(1, 2, 64), [1], 0.01)


def test_the_bound_rejects_a_code_that_is_off_by_one() -> None:
    pages = random_pages([4], 1, 128)
    q = torch.randn(1, 1, 128).sign()  # no dim is too weak for its code to matter
    arguments = (pages.block_table, pages.seq_lens, starts([1]), 128**-0.5)
    k, v = pages.rows(0)
    slots = page_slots(pages.block_table[0], 64, 4)
    codes_v = read_tokens(pages.cache, slots, 128)[1].codes.double()
    expected = attend(q.double(), k, v, 128**-0.5)
    bound = kv_attention_bound(q.double(), k, v, codes_v, 128**-0.5) + 2.0**-23 * expected.abs()
    start = {"k": 0, "v": 64 * (72 + 16)}
    for kind, token, dim in [("k", 3, 3), ("k", 1, 111), ("v", 2, 0), ("v", 0, 60)]:
        byte, shift, _ = (int(t[token % 16, dim]) for t in kv_pages.place_table(kind, 128))
        wrong = pages.cache.clone()
        at = start[kind] + byte
        wrong[int(pages.block_table[0, 0]), 0, at] ^= 1 << shift
        out = ops.kv_attention(q, wrong, *arguments)
        assert ((out.double() - expected).abs() > bound).any(), (kind, token, dim)
    assert ((ops.kv_attention(q, pages.cache, *arguments).double() - expected).abs() <= bound).all()


def test_kv_attention_agrees_with_the_reference() -> None:
    pages = random_pages([70, 5], 2, 64)
    q, rest = torch.randn(12, 4, 64), (*cos_sin(12, 64), rotations(1, 64))
    arguments = (pages.block_table, pages.seq_lens, starts([9, 3]), 0.125)
    k, slots = torch.zeros(12, 2, 64), torch.full((12,), -1)
    specified = reference.kv_append(k, k, *rest, pages.cache, slots, q=q)
    expected = reference.kv_attention(specified, pages.cache, *arguments)
    q = rotated_queries(q, 2, *rest)[0]
    assert (ops.kv_attention(q, pages.cache, *arguments) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype_rounds_the_same_numbers(dtype: torch.dtype) -> None:
    pages = random_pages([70, 5], 2, 64)
    q = torch.randn(13, 4, 64).to(dtype)
    arguments = (q, pages.cache, pages.block_table, pages.seq_lens, starts([9, 3]), 0.125)
    exact = ops.kv_attention(*arguments, out_dtype=torch.float32)
    assert exact.dtype == torch.float32 and ops.kv_attention(*arguments).dtype == dtype
    for out_dtype in DTYPES:
        out = ops.kv_attention(*arguments, out_dtype=out_dtype)
        assert torch.equal(out, exact.to(out_dtype))
        assert reference.kv_attention(*arguments, out_dtype=out_dtype).dtype == out_dtype
    assert not torch.equal(exact, exact.to(torch.bfloat16).float())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", [[70, 5], [2100, 1]], ids=str)  # one split, and several
def test_high_dims_are_the_same_numbers_in_the_order_of_o_proj(
    lengths: list[int], head_dim: int
) -> None:
    pages = random_pages(lengths, 2, head_dim)
    q = torch.randn(4, 6, head_dim)  # a row beyond the last sequence
    arguments = (q, pages.cache, pages.block_table, pages.seq_lens, starts([2, 1]), 0.1)
    apart = ops.kv_attention(*arguments)
    for head_dim_hi in (0, 1, head_dim // 8, 24, head_dim):
        for out_dtype in DTYPES:
            out = ops.kv_attention(*arguments, out_dtype=out_dtype, head_dim_hi=head_dim_hi)
            assert torch.equal(out, join_heads(apart, head_dim_hi).to(out_dtype))
    shapes = {reference.kv_attention(*arguments, head_dim_hi=8).shape, out.shape}
    assert shapes == {(4, 6 * head_dim)}
    assert torch.equal(ops.kv_attention(*arguments, head_dim_hi=0).view(q.shape), apart)


def test_join_heads_puts_the_low_dims_first() -> None:
    x = torch.arange(8).view(1, 2, 4)
    assert join_heads(x, 1).tolist() == [[0, 1, 2, 4, 5, 6, 3, 7]]
    assert join_heads(x, 0).tolist() == [list(range(8))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_attention_of_a_slice_of_a_projection(dtype: torch.dtype) -> None:
    pages = random_pages([70, 5], 2, 64)
    wide = torch.randn(12, 9, 64).to(dtype)
    rest = (*cos_sin(12, 64), rotations(2, 64))
    arguments = (pages.cache, pages.block_table, pages.seq_lens, starts([9, 3]), 0.125)
    for q in (wide[:, 1:5], wide[:, 5:]):
        apart = (q, rotated_queries(q, 2, *rest)[0])
        together = (q.contiguous(), rotated_queries(q.contiguous(), 2, *rest)[0])
        for one, other in zip(apart, together, strict=True):
            out = ops.kv_attention(one, *arguments)
            assert torch.equal(out, ops.kv_attention(other, *arguments))
            assert out.is_contiguous() and not q.is_contiguous()
    with pytest.raises(RuntimeError, match="q: expected .* with contiguous heads"):
        ops.kv_attention(wide[:, :8:2], *arguments)
    one = random_pages([70, 5], 1, 64)  # one head: its stride says nothing
    arguments = (one.cache, one.block_table, one.seq_lens, starts([9, 3]), 0.125)
    assert torch.equal(
        ops.kv_attention(wide[:, 3:4], *arguments),
        ops.kv_attention(wide[:, 3:4].contiguous(), *arguments),
    )


def test_kv_attention_of_appended_tokens_end_to_end() -> None:
    """RoPE and rotation on both sides cancel: 8-bit-like agreement with plain attention."""
    n_kv, length, head_dim = 2, 150, 128
    k, v, q = (torch.randn(length, h, head_dim) for h in (n_kv, n_kv, 4))
    cos, sin = cos_sin(length, head_dim)
    rotation = rotations(n_kv, head_dim)
    cache = torch.full(kv_pages.cache_shape(3, n_kv, 64, head_dim), 255, dtype=torch.uint8)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    slots = page_slots(table[0], 64, length)
    rotated = ops.kv_append(k, v, cos, sin, rotation, cache, slots, q=q)
    lengths = torch.tensor([length], dtype=torch.int32)
    out = ops.kv_attention(rotated, cache, table, lengths, starts([length]), head_dim**-0.5)
    exact = attend(rope(q, cos, sin), rope(k, cos, sin), v, head_dim**-0.5)
    relative = (out - exact).norm() / exact.norm()
    assert relative < 0.2  # 4-bit noise on random data, where the rotation finds nothing to gain
    q = rope(q, cos, sin)  # and no rotation
    wrong = ops.kv_attention(q, cache, table, lengths, starts([length]), head_dim**-0.5)
    assert (wrong - exact).norm() / exact.norm() > 0.5


@pytest.mark.parametrize("matrices", [0, 1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_append_and_kv_attention_are_float64_attention_of_rotated_queries(
    head_dim: int, matrices: int
) -> None:
    """A layer's two calls, on k, v and q of every dtype."""
    length, n_kv = 70, 2
    rotation = rotations(matrices, head_dim).half() if matrices else None
    rest = (*cos_sin(length, head_dim), rotation)
    for dtype in DTYPES:
        pages = random_pages([length], n_kv, head_dim, page_size=32)
        k, v, q = (torch.randn(length, n, head_dim).to(dtype) for n in (n_kv, n_kv, 6))
        slots = page_slots(pages.block_table[0], 32, length)
        rotated = ops.kv_append(k, v, *rest, pages.cache, slots, q=q)
        exact = rotated_queries(q, n_kv, *rest)[1]
        check(pages, rotated, [length], head_dim**-0.5, exact, dtype)
        with pytest.raises(AssertionError):  # sharp: the query of another head
            check(pages, rotated.roll(1, 1), [length], head_dim**-0.5, exact, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_has_the_same_bits_chunked_batched_and_alone(head_dim: int) -> None:
    lengths, n_q = [1100, 70, 1, 333], 6
    pages = random_pages(lengths, 2, head_dim)
    tokens = sum(lengths)
    q = torch.randn(tokens, n_q, head_dim)
    cos, sin = cos_sin(tokens, head_dim)
    rotation = rotations(2, head_dim)
    query_starts = starts(lengths)
    rotated = rotated_queries(q, 2, cos, sin, rotation)[0]
    whole = ops.kv_attention(
        rotated, pages.cache, pages.block_table, pages.seq_lens, query_starts, 0.1
    )
    for i, chunks in enumerate([(1, 63, 64, 65, 700, 206, 1), (70,), (1,), (2, 330, 1)]):
        begin = int(query_starts[i])
        done = 0
        for count in chunks:
            rows = slice(begin + done, begin + done + count)
            done += count
            some = (x[rows].contiguous() for x in (q, cos, sin))
            part = ops.kv_attention(
                rotated_queries(next(some), 2, *some, rotation)[0],
                pages.cache,
                pages.block_table[i : i + 1],
                torch.tensor([done], dtype=torch.int32),
                starts([count]),
                0.1,
            )
            assert torch.equal(part, whole[rows]), (i, done, count)
        assert done == lengths[i]


def test_kv_attention_has_the_same_bits_for_every_thread_count_and_page_size() -> None:
    k, v = [torch.randn(2500, 1, 128)], [torch.randn(2500, 1, 128)]
    q = torch.randn(3, 5, 128)
    results = []
    threads = torch.get_num_threads()
    for page_size in (16, 32, 48, 64, 128):
        pages = fill_pages(k, v, page_size, garbage=page_size)
        for count in (1, 2, 3):
            try:
                torch.set_num_threads(count)
                results.append(
                    ops.kv_attention(
                        q, pages.cache, pages.block_table, pages.seq_lens, starts([3]), 0.1
                    )
                )
            finally:
                torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_ignores_the_tails_of_pages(head_dim: int) -> None:
    for length in (1, 15, 17, 31, 33, 63, 65):
        k, v = [torch.randn(length, 2, head_dim)], [torch.randn(length, 2, head_dim)]
        q = torch.randn(2, 4, head_dim)
        outs = []
        for garbage in (0, 255, 0x7C):
            p = fill_pages(k, v, 64, garbage=garbage)
            outs.append(ops.kv_attention(q, p.cache, p.block_table, p.seq_lens, starts([2]), 0.2))
        assert outs[0].isfinite().all()
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_kv_attention_of_shared_pages() -> None:
    pages = random_pages([128, 10, 20], 1, 64, page_size=32)
    table = torch.full((3, 6), -1, dtype=torch.int32)
    prefix = pages.block_table[0, :4]
    table[0, :4] = prefix
    table[1, :4], table[1, 4] = prefix, pages.block_table[1, 0]
    table[2, :2], table[2, 2] = prefix[:2], pages.block_table[2, 0]
    lengths = torch.tensor([128, 138, 84], dtype=torch.int32)
    check(Pages(pages.cache, table, lengths, 64), torch.randn(30, 2, 64), [10, 10, 10], 0.125)


def test_kv_attention_of_queries_that_see_nothing_and_of_no_queries() -> None:
    pages = random_pages([3, 0, 40], 1, 64)
    out = check(pages, torch.randn(14, 2, 64), [7, 5, 2], 0.125)
    assert (out[:4] == 0).all() and (out[7:12] == 0).all() and (out[4:7] != 0).any()
    assert check(pages, torch.randn(0, 2, 64), [0, 0, 0], 0.125).shape == (0, 2, 64)
    # No sequences: all rows are padding.
    none = torch.empty(0, 1, dtype=torch.int32)
    out = ops.kv_attention(
        torch.randn(2, 2, 64), pages.cache, none, none[:, 0].contiguous(), starts([]), 0.125
    )
    assert (out == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_returns_nan_where_a_visible_row_holds_nan(head_dim: int) -> None:
    length, low = 100, kv_pages.low_dims(head_dim)
    q = torch.randn(length, 2, head_dim)
    for kind, dim in [("k", 0), ("k", head_dim - 1), ("v", 3), ("v", head_dim - 2)]:
        rows = {name: torch.randn(length, 1, head_dim) for name in "kv"}
        rows[kind][70, 0, dim] = torch.nan
        p = fill_pages([rows["k"]], [rows["v"]], 64)
        out = ops.kv_attention(q, p.cache, p.block_table, p.seq_lens, starts([length]), 0.125)
        assert out[:70].isfinite().all()  # NaN of the future has no effect
        part = slice(0, head_dim)
        if kind == "v":
            part = slice(0, low) if dim < low else slice(low, head_dim)
        assert out[70:, :, part].isnan().all()
        if kind == "v":
            rest = slice(low, head_dim) if dim < low else slice(0, low)
            assert out[70:, :, rest].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_kv_attention_of_a_query_with_nan(value: float) -> None:
    pages = random_pages([90], 1, 64)
    for rotation in (None, rotations(1, 64)):
        q = torch.randn(5, 2, 64)
        arguments = (pages.cache, pages.block_table, pages.seq_lens, starts([5]), 0.125)
        clean = ops.kv_attention(rotated_queries(q, 1, None, None, rotation)[0], *arguments)
        q[2, 1, 60] = value
        out = ops.kv_attention(rotated_queries(q, 1, None, None, rotation)[0], *arguments)
        assert out[2, 1].isnan().all()
        out[2, 1] = clean[2, 1]
        assert torch.equal(out, clean)


def arguments() -> dict[str, object]:
    pages = random_pages([40, 70], 2, 64)
    pages.block_table[pages.block_table > 9] = -1
    return {
        "q": torch.randn(5, 4, 64),
        "cache": pages.cache,
        "block_table": pages.block_table,
        "seq_lens": pages.seq_lens,
        "query_starts": starts([2, 3]),
        "scale": 0.125,
        "out_dtype": None,
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t.double(), r"q: expected float32 or float16 or bfloat16.*got float64"),
        (
            "q",
            lambda t: t[0],
            r"q: expected .*\[\*, \*, \*\] with contiguous heads, got .*\[4, 64\]",
        ),
        ("q", lambda t: t[..., :32].clone(), r"q: expected a head dimension .* of 64 or 128, got"),
        (
            "q",
            lambda t: t[:, :3].clone(),
            r"q: expected heads that are a multiple of the cache's 2",
        ),
        ("q", lambda t: t.transpose(0, 1), r"q: .*\(not contiguous\)"),
        (
            "q",
            lambda t: t[:1].expand(5, -1, -1),
            r"q: .* with contiguous heads, got .*not contiguous",
        ),
        ("q", lambda t: t.double().expand(2, 5, 4, 64)[:, 0], r"q: expected .* got float64"),
        ("out_dtype", lambda t: torch.int8, r"out_dtype: expected float32, float16 .* got int8"),
        ("cache", lambda t: t[0], r"cache: expected 3 dimensions, got uint8 \[2, 5632\]"),
        ("cache", lambda t: t.char(), r"cache: expected uint8 .*got int8"),
        (
            "cache",
            lambda t: t[..., :-1].clone(),
            r"cache: expected pages of a multiple of 32 tokens",
        ),
        ("block_table", lambda t: t.long(), r"block_table: expected int32 .*got int64"),
        ("block_table", lambda t: t[0], r"block_table: expected int32 \[\*, \*\] contiguous, got"),
        (
            "block_table",
            lambda t: t + 5,
            r"block_table: expected pages from 0 to 4, got \d for a pa",
        ),
        (
            "block_table",
            lambda t: t - 9,
            r"block_table: expected pages from 0 to 4, got -\d for a p",
        ),
        (
            "seq_lens",
            lambda t: t[:1],
            r"seq_lens: expected int32 \[2\] contiguous, got int32 \[1\]",
        ),
        (
            "seq_lens",
            lambda t: t - 41,
            r"seq_lens: expected 0 to 192 tokens .*got -1 for sequence 0",
        ),
        (
            "seq_lens",
            lambda t: t.new_tensor([40, 210]),
            r"seq_lens: expected 0 to 192 tokens .*got 210 for sequence 1",
        ),
        ("query_starts", lambda t: t[1:], r"query_starts: expected int32 \[3\] contiguous, got"),
        ("query_starts", lambda t: t + 1, r"query_starts: expected 0, got 1 for sequence 0"),
        ("query_starts", lambda t: t * 2, r"query_starts: .* at most 5 \(rows of q\), got 10 for"),
        (
            "query_starts",
            lambda t: t[[0, 2, 1]],
            r"query_starts: .*not descend .*got 2 for the end",
        ),
        ("head_dim_hi", lambda _: 65, "head_dim_hi: expected 0 to 64, got 65"),
        ("head_dim_hi", lambda _: -1, "head_dim_hi: expected 0 to 64, got -1"),
    ],
)
def test_kv_attention_refuses(name: str, change: object, message: str) -> None:
    values = arguments()
    values[name] = change(values.get(name))
    with pytest.raises(RuntimeError, match="kv_attention: " + message):
        ops.kv_attention(**values)


def test_kv_attention_passes_opcheck() -> None:
    values = arguments()
    torch.library.opcheck(torch.ops.resq.kv_attention.default, tuple(values.values()))
    values["q"] = values["q"].bfloat16()
    torch.library.opcheck(torch.ops.resq.kv_attention.default, tuple(values.values())[:6])
    values["q"], values["out_dtype"] = torch.randn(5, 9, 64)[:, 2:6], torch.float16
    torch.library.opcheck(torch.ops.resq.kv_attention.default, tuple(values.values()))
    values["head_dim_hi"] = 8
    torch.library.opcheck(torch.ops.resq.kv_attention.default, tuple(values.values()))


def test_kv_attention_compiles_to_one_graph_for_every_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.kv_attention, fullgraph=True, dynamic=True)
    pages = random_pages([100], 2, 64)
    with fresh_cache():  # graphs on disk are not told apart by an operator's schema
        for count in (3, 8):
            q = torch.randn(count, 4, 64)
            values = (q, pages.cache, pages.block_table, pages.seq_lens, starts([count]), 0.125)
            assert torch.equal(compiled(*values), ops.kv_attention(*values))
