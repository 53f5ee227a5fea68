"""kv_attention on CUDA against float64 attention over the dequantized pages.

The tolerance is the cache's own error: with k and v before quantization known, the output may be
off by 2 % of what quantization itself moves it, in the root mean square of a row (and by 15 % in
one number). That rejects one wrong code and one token too many, which other tests here show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import emulation
import pytest
import torch
from gemm_cases import forced
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

from resq_kernels.formats import join_heads
from resq_kernels.reference.attention import attend

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclasses.dataclass
class Case:
    """Sequences in pages, their rows before quantization, and queries.

    `exact_q` is what `q` stands for, where that is rounded already.
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    pages: Pages
    counts: list[int]
    scale: float
    q: torch.Tensor
    out_dtype: torch.dtype | None = None
    exact_q: torch.Tensor | None = None

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *self.counts]).cumsum(0).int()

    def run(self, device: emulation.Emulated, **changes: torch.Tensor) -> torch.Tensor:
        arguments = {
            "q": self.q,
            "cache": self.pages.cache,
            "block_table": self.pages.block_table,
            "seq_lens": self.pages.seq_lens,
            "query_starts": self.starts,
        } | changes
        return device.kv_attention(*arguments.values(), self.scale, self.out_dtype)

    def rotate(self, device: emulation.Emulated, *rest: torch.Tensor | None) -> None:
        """Replaces the queries by those that `kv_append` returns for cos, sin and rotation."""
        n_kv = self.pages.cache.shape[1]
        self.q, self.exact_q = rotated_queries(self.q, n_kv, *rest, device.kv_append)

    def joined(self, device: emulation.Emulated, head_dim_hi: int) -> torch.Tensor:
        """The result in the order of o_proj's columns."""
        where = (self.pages.cache, self.pages.block_table, self.pages.seq_lens, self.starts)
        return device.kv_attention(self.q, *where, self.scale, None, head_dim_hi)

    def wrong_rows(self, out: torch.Tensor) -> list[str]:
        """What lies outside the tolerance."""
        q = self.q.double() if self.exact_q is None else self.exact_q
        found = []
        for i, count in enumerate(self.counts):
            begin = int(self.starts[i])
            rows = slice(begin, begin + count)
            exact = attend(q[rows], *self.pages.rows(i), self.scale)
            plain = attend(q[rows], self.k[i].double(), self.v[i].double(), self.scale)
            error = (out[rows].double() - exact).abs()
            rounding = ROUNDING[out.dtype] * exact.abs()
            noise = (plain - exact).square().mean(-1, keepdim=True).sqrt()
            rms = (error - rounding).clamp_min(0).square().mean(-1, keepdim=True).sqrt()
            if not (rms <= 0.02 * noise).all():
                found.append(f"sequence {i}: rms {(rms / noise).max():.3g} of the cache's error")
            if not (error <= 0.15 * noise + rounding).all():
                found.append(f"sequence {i}: max {((error - rounding) / noise).max():.3g}")
        if not (out[int(self.starts[-1]) :] == 0).all():
            found.append("rows beyond the last sequence are not 0")
        return found

    def check(self, device: emulation.Emulated) -> torch.Tensor:
        out = self.run(device)
        assert out.shape == self.q.shape and out.dtype == (self.out_dtype or self.q.dtype)
        assert not self.wrong_rows(out)
        return out


def make(
    lengths: list[int],
    counts: list[int],
    head_dim: int,
    *,
    n_kv: int = 1,
    group: int = 4,
    page_size: int = 64,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    hi_bits: int = 8,
    outliers: float = 1.0,
) -> Case:
    gain = torch.ones(head_dim)
    gain[head_dim // 8 * 7 :] = outliers  # the high dims hold the directions of large variance
    k, v = ([torch.randn(n, n_kv, head_dim) * gain for n in lengths] for _ in "kv")
    pages = fill_pages(k, v, page_size, hi_bits)
    q = torch.randn(sum(counts) + padding, n_kv * group, head_dim).to(dtype)
    return Case(k, v, pages, counts, scale or head_dim**-0.5, q)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", [[70, 5], [1100, 1]], ids=str)  # one split, and a merge
def test_high_dims_are_the_same_numbers_in_the_order_of_o_proj(
    device: emulation.Emulated, lengths: list[int], head_dim: int
) -> None:
    case = make(lengths, [2, 1], head_dim, dtype=torch.bfloat16)
    apart = case.run(device)
    for head_dim_hi in (0, 1, head_dim // 8, head_dim):
        assert torch.equal(case.joined(device, head_dim_hi), join_heads(apart, head_dim_hi))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_of_a_batch(
    device: emulation.Emulated, head_dim: int, dtype: torch.dtype
) -> None:
    lengths, counts = [1, 37, 64, 200, 0, 65, 130], [1, 3, 1, 8, 0, 1, 17]
    case = make(lengths, counts, head_dim, n_kv=2, group=2, dtype=dtype, padding=2)
    case.check(device)
    given, case.out_dtype = case.q, dtype
    cos, sin = cos_sin(sum(counts) + 2, head_dim)
    for rotation in (None, rotations(1, head_dim), rotations(2, head_dim).half()):
        case.q = given
        # The same rotation on both sides cancels; here it is on q alone, as good a q as any.
        case.rotate(device, cos.to(dtype), sin, rotation)
        case.check(device)


@pytest.mark.parametrize("count", [1, 3, 8, 17])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 12])
def test_kv_attention_of_every_group_and_query_length(
    sm90: emulation.Emulated, group: int, count: int
) -> None:
    head_dim = 64 if group % 2 else 128
    make([90, 17], [count, 17], head_dim, n_kv=2, group=group, page_size=32).check(sm90)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, -0.3])
def test_kv_attention_from_flat_to_peaky_over_splits(
    sm80: emulation.Emulated, head_dim: int, scale: float
) -> None:
    make([2500], [2], head_dim, group=2, scale=scale).check(sm80)


@pytest.mark.parametrize("outliers", [4.0, 16.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_of_large_high_dims(
    sm80: emulation.Emulated, head_dim: int, outliers: float
) -> None:
    make([300], [2], head_dim, outliers=outliers, scale=0.1 / outliers**2).check(sm80)


@pytest.mark.parametrize("outliers", [1.0, 8.0, 16.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_and_sums_of_values_are_within_the_gates(
    sm90: emulation.Emulated, head_dim: int, outliers: float
) -> None:
    """Scores within 2 % and weighted sums within 1 % of the cache's own error.

    Two tokens with values 0 and 1 give the sigmoid of the difference of their scores.
    """
    case = make([2] * 120, [1] * 120, head_dim, group=1, outliers=outliers)
    case.q[..., head_dim // 8 * 7 :] *= outliers
    case.v = [torch.stack([torch.zeros(1, head_dim), torch.ones(1, head_dim)])] * 120
    case.pages = fill_pages(case.k, case.v, 32)
    case.scale = 0.1 / outliers**2
    out = case.run(sm90)[:, 0, 0].double()
    exact, plain = (
        torch.stack(
            [q @ (k[1, 0] - k[0, 0]) for q, k in zip(case.q[:, 0].double(), rows, strict=True)]
        )
        for rows in ([case.pages.rows(i)[0] for i in range(120)], [k.double() for k in case.k])
    )
    error, noise = torch.logit(out) - exact * case.scale, (plain - exact) * case.scale
    assert error.norm() <= 0.02 * noise.norm()

    case = make([300], [4], head_dim, outliers=outliers, scale=1e-6)
    out = case.run(sm90)
    q, (k, v) = case.q.double(), case.pages.rows(0)
    exact = attend(q, k, v, case.scale)
    noise = attend(q, k, case.v[0].double(), case.scale) - exact
    assert (out.double() - exact).norm() <= 0.01 * noise.norm()


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e4])
def test_kv_attention_of_any_magnitude(sm80: emulation.Emulated, magnitude: float) -> None:
    """Values and queries far from 1, beside some that are not."""
    case = make([200], [1], 128)
    sizes = torch.where(torch.rand(200) < 0.9, magnitude, 1.0)[:, None, None]
    case.v = [v * sizes for v in case.v]
    case.pages = fill_pages(case.k, case.v, 64)
    case.q *= 1 / magnitude**2
    case.scale *= magnitude**2
    case.check(sm80)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_has_the_same_bits_alone_and_under_every_block_table(
    device: emulation.Emulated, head_dim: int
) -> None:
    lengths, counts = [1100, 40, 333], [2, 1, 20]
    case = make(lengths, counts, head_dim, n_kv=2, group=3)
    whole = case.run(device)
    for page_size in (32, 64, 128):
        pages = fill_pages(case.k, case.v, page_size, garbage=page_size)
        for i, count in enumerate(counts):
            rows = slice(int(case.starts[i]), int(case.starts[i]) + count)
            table = torch.cat([pages.block_table[i : i + 1]] * (1 + i), dim=1)
            out = case.run(
                device,
                q=case.q[rows].contiguous(),
                cache=pages.cache,
                block_table=table,
                seq_lens=pages.seq_lens[i : i + 1].clone(),
                query_starts=torch.tensor([0, count], dtype=torch.int32),
            )
            assert torch.equal(out, whole[rows]), (page_size, i)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_has_the_same_bits_for_every_chunking(
    sm80: emulation.Emulated, head_dim: int
) -> None:
    """Eight and sixteen rows a block, splits in one block and merged: all give a row its bits."""
    length = 1058
    case = make([length], [38], head_dim, group=2)
    whole = case.run(sm80)
    with forced(sm80, "kv_attention", "splits=whole"):
        assert torch.equal(case.run(sm80), whole)
    done = 0
    for count in (1, 4, 20, 13):
        out = case.run(
            sm80,
            q=case.q[done : done + count].contiguous(),
            seq_lens=torch.tensor([length - 38 + done + count], dtype=torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
        )
        assert torch.equal(out, whole[done : done + count]), count
        done += count


@pytest.mark.parametrize("page_size", [32, 64, 96, 192])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_both_forms_of_the_kernel_have_the_same_bits(
    sm80: emulation.Emulated, head_dim: int, page_size: int
) -> None:
    """Tiles through rings of warps (sm80), pages through a ring of the block (sm90).

    The last warp to read a stage fills it again: orders of warps differ with the seed.
    """
    lengths, counts = [1500, 1, 70, 0, 129], [1, 1, 5, 0, 20]
    case = make(lengths, counts, head_dim, n_kv=2, group=3, page_size=page_size, padding=1)
    case.pages = fill_pages(case.k, case.v, page_size, garbage=0x7C)
    expected = case.run(sm80)
    assert not case.wrong_rows(expected)
    for seed in range(3):
        for rows in (slice(None), slice(0, 2)):  # sixteen and eight rows a block
            out = case.run(
                emulation.Emulated(90, seed=seed),
                q=case.q[rows].contiguous(),
                block_table=case.pages.block_table[rows].contiguous(),
                seq_lens=case.pages.seq_lens[rows].contiguous(),
                query_starts=case.starts[: len(case.pages.seq_lens[rows]) + 1].contiguous(),
            )
            assert torch.equal(out, expected[rows]), (seed, rows)


@pytest.mark.parametrize("chunks", [(150,), (64, 64, 22), (1, 40, 109)], ids=str)
def test_decoding_does_not_depend_on_how_the_prompt_was_appended(
    sm90: emulation.Emulated, chunks: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    length, head_dim = 150, 128
    k, v = torch.randn(2, length, 1, head_dim).bfloat16()
    cos, sin = cos_sin(length, head_dim)
    rotation = rotations(1, head_dim).half()
    case = make([length], [1], head_dim, dtype=torch.bfloat16)
    slots = page_slots(case.pages.block_table[0], 64, length)
    whole, parts = (torch.full_like(case.pages.cache, 255) for _ in range(2))
    sm90.kv_append(k, v, cos, sin, rotation, whole, slots)
    for rows in torch.arange(length).split(chunks):
        some = (t[rows].contiguous() for t in (k, v, cos, sin))
        sm90.kv_append(*some, rotation, parts, slots[rows].contiguous())
    assert torch.equal(parts, whole)
    assert torch.equal(case.run(sm90, cache=parts), case.run(sm90, cache=whole))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_ignores_the_tails_of_pages(device: emulation.Emulated, head_dim: int) -> None:
    for length in (1, 15, 17, 33, 63):
        case = make([length], [2], head_dim)
        outs = []
        for garbage in (0, 255, 0x7C):
            pages = fill_pages(case.k, case.v, 64, garbage=garbage)
            outs.append(case.run(device, cache=pages.cache, block_table=pages.block_table))
        assert outs[0].isfinite().all()
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def kernels(call: Callable[[], object]) -> list[str]:
    """The kernels that a call launches."""
    emulator = emulation.emulator()
    emulator.take_counters()
    with emulator.options(count="on"):
        call()
    names = [launch["kernel"] for launch in emulator.take_counters()]
    return [re.search(r"\d(kv_[a-z0-9_]+?_kernel)", name)[1] for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_queries_are_read_by_the_attention_kernel_itself(
    device: emulation.Emulated, head_dim: int, dtype: torch.dtype
) -> None:
    """Queries of a slice, in any dtype, with the bits that they have as `kv_append` returns them.

    The identity as a rotation multiplies by one and adds zeros: the same numbers in float32.
    """
    attend = "kv_attention_sm90_kernel" if device.arch == 90 else "kv_attention_kernel"
    merge = "kv_attention_merge_kernel"
    case = make([1100, 60], [2, 9], head_dim, group=4, padding=1)
    wide = torch.randn(12, 7, head_dim).to(dtype)
    case.q = wide[:, 2:6]
    outs = {}

    def run(name: str, **changes: torch.Tensor) -> None:
        outs[name] = case.run(device, **changes)

    assert kernels(lambda: run("slice")) == [attend, merge]
    run("contiguous", q=case.q.contiguous())
    run("widened", q=case.q.float())
    identity = torch.eye(head_dim, dtype=dtype)[None]
    assert kernels(lambda: case.rotate(device, None, None, identity)) == ["kv_append_kernel"]
    assert kernels(lambda: run("appended")) == [attend, merge]
    for case.out_dtype in DTYPES:
        run("out")
        assert torch.equal(outs["out"], outs["widened"].to(case.out_dtype))
    assert outs["slice"].dtype == dtype and outs["widened"].dtype == torch.float32
    assert torch.equal(outs["appended"], outs["widened"])
    for name in ("slice", "contiguous"):
        assert torch.equal(outs[name], outs["widened"].to(dtype)), name


def test_kv_attention_of_shared_pages(device: emulation.Emulated) -> None:
    case = make([128, 10, 20], [2, 2, 2], 64, page_size=32)
    table = torch.full((3, 6), -1, dtype=torch.int32)
    prefix = case.pages.block_table[0, :4]
    table[0, :4] = prefix
    table[1, :4], table[1, 4] = prefix, case.pages.block_table[1, 0]
    table[2, :2], table[2, 2] = prefix[:2], case.pages.block_table[2, 0]
    lengths = torch.tensor([128, 138, 84], dtype=torch.int32)
    for rows in (case.k, case.v):
        rows[1], rows[2] = torch.cat([rows[0], rows[1]]), torch.cat([rows[0][:64], rows[2]])
    case.pages = Pages(case.pages.cache, table, lengths, 64)
    case.check(device)


def test_kv_attention_of_queries_that_see_nothing(device: emulation.Emulated) -> None:
    case = make([3, 0, 40], [7, 5, 2], 64, padding=3)
    out = case.run(device)
    assert (out[:4] == 0).all() and (out[7:12] == 0).all() and (out[14:] == 0).all()
    assert (out[4:7] != 0).any(-1).all() and (out[12:14] != 0).any(-1).all()
    assert case.run(device, q=case.q[:0], query_starts=torch.zeros(4).int()).shape == (0, 4, 64)
    none = torch.empty(0, 1, dtype=torch.int32)
    no_sequences = {"block_table": none, "seq_lens": none[:, 0].contiguous()}
    assert (case.run(device, query_starts=torch.zeros(1).int(), **no_sequences) == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_attention_returns_nan_where_a_visible_row_holds_nan(
    sm80: emulation.Emulated, head_dim: int
) -> None:
    length, low = 90, head_dim // 8 * 7
    for kind, dim in [("k", 0), ("k", head_dim - 1), ("v", 3), ("v", head_dim - 2)]:
        case = make([length], [40], head_dim, group=2)
        (case.k if kind == "k" else case.v)[0][70, 0, dim] = torch.nan
        case.pages = fill_pages(case.k, case.v, 64)
        out = case.run(sm80)
        assert out[:20].isfinite().all()  # NaN of the future has no effect
        part = slice(0, head_dim)
        if kind == "v":
            part = slice(0, low) if dim < low else slice(low, head_dim)
            rest = slice(low, head_dim) if dim < low else slice(0, low)
            assert out[20:, :, rest].isfinite().all()
        assert out[20:, :, part].isnan().all()
    case = make([90], [5], 64, group=2)
    clean = case.run(sm80)
    for value in (torch.nan, torch.inf):
        case.q[2, 1, 60] = value
        out = case.run(sm80)
        assert out[2, 1].isnan().all()
        out[2, 1] = clean[2, 1]
        assert torch.equal(out, clean)


def test_one_wrong_code_and_one_token_too_many_are_rejected(sm80: emulation.Emulated) -> None:
    case = make([200], [1], 128, n_kv=1, group=4)
    good = case.run(sm80)
    assert not case.wrong_rows(good)
    cache = case.pages.cache.clone()
    slot = int(page_slots(case.pages.block_table[0], 64, 200)[77])
    tile = case.pages.cache.shape[2] // 160 * 88 + slot % 64 // 16 * 1152  # V of the page
    cache[slot // 64, 0, tile + slot % 8 // 2 * 16] ^= 0x04  # a code of V moves by 4 of 15
    assert case.wrong_rows(case.run(sm80, cache=cache))
    more = torch.tensor([201], dtype=torch.int32)
    pages = fill_pages(*([torch.cat([rows[0], rows[0][:1]])] for rows in (case.k, case.v)), 64)
    with_more = case.run(sm80, cache=pages.cache, block_table=pages.block_table, seq_lens=more)
    assert case.wrong_rows(with_more)
    one_less = case.run(sm80, seq_lens=torch.tensor([199], dtype=torch.int32))
    assert case.wrong_rows(one_less)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_lens", torch.tensor([129], dtype=torch.int32)),
        ("seq_lens", torch.tensor([-1], dtype=torch.int32)),
        ("query_starts", torch.tensor([0, 9], dtype=torch.int32)),
        ("block_table", torch.tensor([[1, 77]], dtype=torch.int32)),
    ],
)
def test_kv_attention_stops_at_numbers_that_do_not_fit(
    sm80: emulation.Emulated, name: str, value: torch.Tensor
) -> None:
    case = make([100], [2], 64)
    case.pages.block_table = case.pages.block_table[:, :2].contiguous()
    with emulation.stopped_by_trap():
        case.run(sm80, **{name: value})


def test_kv_attention_refuses_before_any_launch(device: emulation.Emulated) -> None:
    case = make([40], [5], 64)
    wrong = [
        ("q", case.q[:, :3, :32].contiguous(), "q: expected a head dimension"),
        ("cache", case.pages.cache.char(), "cache: expected uint8 .*got int8"),
        ("block_table", case.pages.block_table.long(), "block_table: expected int32"),
        ("seq_lens", torch.ones(2).int(), r"seq_lens: expected int32 \[1\]"),
        ("query_starts", torch.ones(3).int(), r"query_starts: expected int32 \[2\]"),
        ("q", torch.zeros(5, 257)[:, :256].unflatten(1, (4, 64)), "q: expected .*16 bytes apart"),
    ]
    for name, value, message in wrong:
        with pytest.raises(RuntimeError, match="kv_attention: " + message):
            case.run(device, **{name: value})
