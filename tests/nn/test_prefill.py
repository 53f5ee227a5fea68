"""Prefill through dequantized pages: attention of the pages, however a prompt is cut or padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_bounds import kv_attention_bound, prefill_bound
from kv_cases import DTYPES, HEAD_DIMS, Pages, fill_pages, page_slots, rotations

from resq_kernels import kv_pages, ops
from resq_kernels.nn import prefill
from resq_kernels.nn.batch import BatchState
from resq_kernels.nn.paged import PagedKeysValues
from resq_kernels.reference.attention import attend as exact_attention
from resq_kernels.reference.kv_pages import read_tokens
from resq_kernels.testing.quantized_models import random_quantized

Lengths = list[tuple[int, int]]


def make(lengths: list[int], head_dim: int = 64, n_kv: int = 2, page_size: int = 32) -> Pages:
    """Keys 2 in magnitude: queries look at some tokens much more than at others."""
    k, v = ([torch.randn(length, n_kv, head_dim) for length in lengths] for _ in "kv")
    return fill_pages([2 * rows for rows in k], v, page_size)


def run(pages: Pages, q: torch.Tensor, lengths: Lengths, dtype: torch.dtype) -> torch.Tensor:
    assert [length for _, length in lengths] == pages.seq_lens.tolist()
    where = (pages.cache, pages.block_table, pages.seq_lens)
    out = prefill.attend(q, *where, lengths, pages.head_dim**-0.5, dtype)
    assert out.dtype == dtype and out.shape == q.shape
    return out


def expected(
    pages: Pages, q: torch.Tensor, lengths: Lengths, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention in float64 returns, and how far `prefill.attend` may be from it."""
    scale, exact, bound = pages.head_dim**-0.5, [], []
    for i, rows in enumerate(q.double().split([new for new, _ in lengths])):
        k, v = pages.rows(i)
        if len(rows):
            exact.append(exact_attention(rows, k, v, scale))
            bound.append(prefill_bound(rows, k, v, scale, dtype))
    return torch.cat(exact), torch.cat(bound)


def queries(lengths: Lengths, heads: int, head_dim: int) -> torch.Tensor:
    return torch.randn(sum(new for new, _ in lengths), heads, head_dim)


# No prefix; a prefix; equal lengths side by side; nothing new; nothing at all; one new token.
CASES: list[Lengths] = [
    [(90, 90)],
    [(70, 200)],
    [(33, 33), (33, 33), (20, 65), (20, 65), (0, 40), (0, 0), (1, 130), (1, 1), (64, 64)],
]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", CASES, ids=len)
def test_attention_of_the_pages(lengths: Lengths, dtype: torch.dtype, head_dim: int) -> None:
    pages = make([length for _, length in lengths], head_dim)
    q = queries(lengths, 6, head_dim)
    out = run(pages, q, lengths, dtype)
    exact, bound = expected(pages, q, lengths, dtype)
    assert ((out.double() - exact).abs() <= bound).all()

    # kv_attention on the same pages, within its own bound of the same exact result.
    starts = torch.tensor([0] + [new for new, _ in lengths]).cumsum(0).int()
    where = (pages.cache, pages.block_table, pages.seq_lens, starts)
    direct = ops.kv_attention(q, *where, head_dim**-0.5).double()
    row = 0
    for i, (new, length) in enumerate(lengths):
        if new:
            own = slice(row, row + new)
            k, v = pages.rows(i)
            slots = page_slots(pages.block_table[i], pages.page_size, length)
            codes = read_tokens(pages.cache, slots, head_dim)[1].codes.double()
            bound[own] += kv_attention_bound(q[own].double(), k, v, codes, head_dim**-0.5) + 2**-20
            row += new
    assert ((out.double() - direct).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_rejects_what_is_slightly_wrong(dtype: torch.dtype) -> None:
    lengths = [(40, 40), (40, 100)]
    pages = make([40, 100], 128)
    q = queries(lengths, 4, 128)
    exact, bound = expected(pages, q, lengths, dtype)

    def rejected(pages: Pages, q: torch.Tensor) -> bool:
        return bool(((run(pages, q, lengths, dtype).double() - exact).abs() > bound).any())

    assert not rejected(pages, q)
    assert rejected(pages, q.roll(1, 0))  # the queries of the tokens before
    another = Pages(pages.cache, pages.block_table.clone(), pages.seq_lens, 128)
    another.block_table[1, 1] = pages.block_table[1, 0]  # a page twice instead of two
    assert rejected(another, q)
    # One number of V by one step of its 4-bit code.
    moved = Pages(pages.cache.clone(), pages.block_table, pages.seq_lens, 128)
    v_tiles = 32 * kv_pages.token_bytes(128) - 2 * 1152
    moved.cache[pages.block_table[0, 0], 0, v_tiles] ^= 1
    assert rejected(moved, q)


@pytest.mark.parametrize("new, length", [(40, 40), (40, 100)])
def test_a_query_sees_neither_less_nor_more_than_it_should(new: int, length: int) -> None:
    """The bound of float32 is far below the weight of a token, but for few queries and tokens."""
    pages, q = make([length]), torch.randn(new, 2, 64)
    out = run(pages, q, [(new, length)], torch.float32).double()
    q, (k, v) = q.double(), pages.rows(0)
    bound = prefill_bound(q, k, v, 0.125, torch.float32)
    less = exact_attention(q, k[:-1], v[:-1], 0.125)
    more = exact_attention(q[:-1], k, v, 0.125)
    assert ((out - less).abs() > bound).any(-1).double().mean() > 0.9
    assert ((out[:-1] - more).abs() > bound[:-1]).any(-1).double().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_chunking_gives_the_same_attention(dtype: torch.dtype) -> None:
    length = 150
    k, v = torch.randn(2, length, 2, 64)
    q, scale = torch.randn(length, 4, 64), 0.125
    whole = fill_pages([k], [v], 32)
    exact, bound = expected(whole, q, [(length, length)], dtype)
    for chunks in ([length], [149, 1], [1, 64, 65, 20], [32] * 4 + [22]):
        done, parts = 0, []
        for new in chunks:
            done += new
            lens = torch.tensor([done], dtype=torch.int32)
            where = (whole.cache, whole.block_table, lens, [(new, done)])
            parts.append(prefill.attend(q[done - new : done], *where, scale, dtype))
        assert ((torch.cat(parts).double() - exact).abs() <= bound).all()


def test_sequences_share_the_pages_of_a_prefix() -> None:
    """Three sequences with the pages of the first two blocks in common are three with copies."""
    prefix, own = 64, [40, 33, 40]
    k, v = torch.randn(2, prefix, 2, 64)
    tails = [torch.randn(2, n, 2, 64) for n in own]
    rows = [[torch.cat([common, tail[i]]) for tail in tails] for i, common in enumerate((k, v))]
    copies = fill_pages(*rows, 32)
    table = copies.block_table.clone()
    table[1:, :2] = table[0, :2]
    shared = Pages(copies.cache, table, copies.seq_lens, 64)
    assert len(table[:, :2].unique()) == 2
    lengths = [(n, prefix + n) for n in own]
    q = queries(lengths, 4, 64)
    for dtype in DTYPES:
        assert torch.equal(run(shared, q, lengths, dtype), run(copies, q, lengths, dtype))


def test_a_step_of_nothing() -> None:
    pages = make([5, 0])
    out = run(pages, torch.empty(0, 4, 64), [(0, 5), (0, 0)], torch.float16)
    assert out.shape == (0, 4, 64)
    none = Pages(pages.cache, pages.block_table[:0], pages.seq_lens[:0], 64)
    assert run(none, torch.empty(0, 4, 64), [], torch.float16).shape == (0, 4, 64)


def test_refusals() -> None:
    pages = make([5, 9])
    with pytest.raises(ValueError, match="q: expected 7 rows, the new .*, got 6"):
        run(pages, torch.randn(6, 4, 64), [(5, 5), (2, 9)], torch.float16)
    with pytest.raises(ValueError, match="at most as many new tokens as tokens, got 6 of 5"):
        run(pages, torch.randn(8, 4, 64), [(6, 5), (2, 9)], torch.float16)


def test_which_steps_go_through_float16() -> None:
    assert prefill.is_faster("cuda", 65, False)
    assert not prefill.is_faster("cuda", 64, False)  # decode, speculation, short chunks
    assert not prefill.is_faster("cuda", 8192, True)  # whoever asks for bits gets them
    assert not prefill.is_faster("cpu", 8192, False)


def test_varlen_groups_cover_every_new_token_once_and_are_not_too_large() -> None:
    mib = 1 << 20
    assert prefill.varlen_groups([], mib) == []
    assert prefill.varlen_groups([(0, 9), (0, 0)], mib) == []
    assert prefill.varlen_groups([(3, 3)] * 4, mib) == [(0, 4, 3, 3)]
    assert prefill.varlen_groups([(3, 9), (3, 9), (2, 9), (0, 9), (3, 9)], mib) == [
        (0, 2, 3, 9),
        (2, 1, 2, 9),
        (4, 1, 3, 9),
    ]
    assert prefill.varlen_groups([(70, 100)] * 5, mib) == [
        (0, 2, 70, 100),
        (2, 2, 70, 100),
        (4, 1, 70, 100),
    ]
    assert prefill.varlen_groups([(70, 1000)] * 2, mib) == [(0, 1, 70, 1000), (1, 1, 70, 1000)]


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padded_batches_and_chunks_through_the_cache_s_pages(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's storage, in steps: each row of tokens attends as in float64."""
    monkeypatch.setattr(prefill, "is_faster", lambda *_: True)
    steps = [[70, 40, 0, 70], [66, 1, 80, 66], [1, 1, 1, 1]]
    batch, n_kv, n_q, head_dim, scale = 4, 2, 4, 64, 0.125
    rotation = rotations(1, head_dim)
    state, paged = BatchState(), PagedKeysValues(32)
    seen_q: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    outs: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    mask = torch.zeros(batch, 0, dtype=torch.bool)
    for counts in steps:
        width = max(counts)
        columns = torch.arange(width)
        if side == "none":
            counts, fresh = [width] * batch, torch.ones(batch, width, dtype=torch.bool)
        else:
            left = side == "left"
            fresh = torch.stack([columns >= width - n if left else columns < n for n in counts])
        mask = torch.cat([mask, fresh], dim=1)
        given = None if side == "none" else mask
        metadata = state.append(batch, width, given, torch.device("cpu"))
        state = metadata.after
        k, v = torch.randn(2, batch * width, n_kv, head_dim)
        q = torch.randn(batch * width, n_q, head_dim)
        rotated = paged.append(metadata, k, v, rotation, 8, q)
        out = paged.attend(metadata, rotated, scale, torch.float16).view(q.shape)
        assert out.dtype == torch.float16
        assert not out[~fresh.flatten()].any()  # padding
        for i in range(batch):
            own = fresh[i].nonzero()[:, 0] + i * width
            seen_q[i].append(rotated[own].double())
            outs[i].append(out[own].double())
    for i in range(batch):
        slots = torch.arange(len(torch.cat(seen_q[i]))) + i * paged.pages_per_sequence * 32
        k, v = (x.dequantize().double() for x in read_tokens(paged.pages, slots, head_dim))
        q, out = torch.cat(seen_q[i]), torch.cat(outs[i])
        bound = prefill_bound(q, k, v, scale, torch.float16)
        assert ((out - exact_attention(q, k, v, scale)).abs() <= bound).all()


def test_lengths_are_read_from_the_device_only_where_there_is_padding() -> None:
    metadata = BatchState().append(3, 5, None, torch.device("meta"))
    assert metadata.lengths == [(5, 5)] * 3
    state = BatchState().append(3, 5, None, torch.device("cpu")).after
    mask = torch.tensor([[1, 1], [0, 1], [0, 0]])
    mask = torch.cat([torch.ones(3, 5), mask], dim=1)
    metadata = state.append(3, 2, mask, torch.device("cpu"))
    assert metadata.new == 2 and metadata.lengths == [(2, 7), (1, 6), (0, 5)]


@torch.no_grad()
def test_the_attention_module_takes_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long steps of a model go through prefill, unless the module must keep its bits."""
    model = random_quantized("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    module, taken = model.model.layers[0].self_attn, []
    attend = prefill.attend

    def spy(*args: Any) -> torch.Tensor:
        taken.append(args[4])
        return attend(*args)

    monkeypatch.setattr(prefill, "attend", spy)
    module.o_proj = torch.nn.Identity()
    x = torch.randn(2, 80, 256)
    turn = model.model.rotary_emb(x, torch.arange(80)[None])
    direct = module(x, turn)[0]
    assert not taken  # on a CPU
    choose = prefill.is_faster
    monkeypatch.setattr(prefill, "is_faster", lambda _, *rest: choose("cuda", *rest))
    out = module(x, turn)[0]
    assert taken == [[(80, 80)] * 2] and out.dtype == x.dtype
    # float16: each of q, K, V and the weights by 2^-11, of results with the norm of a mean.
    assert 0 < (out - direct).norm() < 4 * 2**-11 * direct.norm()
    module.batch_invariant = True
    assert torch.equal(module(x, turn)[0], direct) and len(taken) == 1
    module.batch_invariant = False
    module(x[:, :64], tuple(t[:, :64] for t in turn))
    assert len(taken) == 1
