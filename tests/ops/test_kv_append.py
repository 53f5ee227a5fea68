"""kv_append writes the bytes of the reference, and no others."""

from __future__ import annotations

import pytest
import torch
from kv_cases import DTYPES, HEAD_DIMS, cos_sin, rotations

from resq_kernels import kv_pages, ops, reference
from resq_kernels.reference.kv_pages import read_tokens


def new_cache(pages: int, n_kv: int, page_size: int, head_dim: int) -> torch.Tensor:
    shape = kv_pages.cache_shape(pages, n_kv, page_size, head_dim)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_rows(tokens: int, n_kv: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    scale = torch.exp2(torch.randint(-20, 12, (tokens, n_kv, 1)).float())
    return (torch.randn(tokens, n_kv, head_dim) * scale + torch.randn(tokens, n_kv, 1)).to(dtype)


@pytest.mark.parametrize("hi_bits", [8, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_append_writes_the_bytes_of_the_codec(
    dtype: torch.dtype, head_dim: int, hi_bits: int
) -> None:
    for page_size in (16, 32, 64, 128) if head_dim == 128 else (32, 64, 128):
        cache = new_cache(3, 2, page_size, head_dim)
        expected = cache.clone()
        slots = torch.randperm(3 * page_size)  # every position of every page
        k, v = (random_rows(len(slots), 2, head_dim, dtype) for _ in "kv")
        k[3] = 6e4  # constant
        k[4, 0, 1], k[5, 1, head_dim - 1], v[6, 0, 0] = torch.nan, torch.inf, -torch.inf
        if dtype != torch.float16:
            v[7] *= 1e9  # saturates
        half = slots[: len(slots) // 2]  # the other half of the bytes must stay what it is
        reference.kv_append(
            k[: len(half)], v[: len(half)], None, None, None, expected, half, hi_bits
        )
        ops.kv_append(k[: len(half)], v[: len(half)], None, None, None, cache, half, hi_bits)
        assert torch.equal(cache, expected)
        reference.kv_append(k, v, None, None, None, expected, slots, hi_bits)
        ops.kv_append(k, v, None, None, None, cache, slots, hi_bits)
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("hi_bits", [8, 4])
def test_kv_append_of_zeros_does_not_depend_on_their_signs(hi_bits: int) -> None:
    zeros = torch.zeros(3, 1, 64)
    zeros[1], zeros[2, 0, ::3] = -0.0, -0.0
    cache = torch.full(kv_pages.cache_shape(1, 1, 32, 64), 255, dtype=torch.uint8)
    ops.kv_append(zeros, zeros, None, None, None, cache, torch.arange(3), hi_bits)
    for rows in read_tokens(cache, torch.arange(3), 64):
        assert not rows.ranges.signbit().any()
        assert (rows.codes == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("matrices", [0, 1, 3])
def test_kv_append_rotates_keys_as_the_reference(matrices: int, head_dim: int) -> None:
    tokens, n_kv = 300, 3
    slots = torch.randperm(320)[:tokens]
    cos, sin = cos_sin(tokens, head_dim)
    rotation = rotations(matrices, head_dim) if matrices else None
    for dtype in DTYPES:
        k, v = (torch.randn(tokens, n_kv, head_dim).to(dtype) for _ in "kv")
        stored = None if rotation is None else rotation.to(dtype)
        arguments = (k, v, cos.to(dtype), sin.to(dtype), stored)
        cache = new_cache(5, n_kv, 64, head_dim)
        expected = cache.clone()
        ops.kv_append(*arguments, cache, slots)
        reference.kv_append(*arguments, expected, slots)
        got_k, got_v = read_tokens(cache, slots, head_dim)
        k_rows, v_rows = read_tokens(expected, slots, head_dim)
        assert all(torch.equal(a, b) for a, b in zip(got_v, v_rows, strict=True))
        # The order of the rotation's float32 sum is free: a code at a tie may move by one, and a
        # scale or offset by one float16 step.
        difference = (got_k.codes.int() - k_rows.codes.int()).abs()
        assert difference.max() <= 1 and (difference > 0).double().mean() <= 1e-3
        assert (got_k.ranges != k_rows.ranges).double().mean() <= 5e-3
        assert torch.allclose(got_k.ranges, k_rows.ranges, rtol=2**-9, atol=0)


def test_kv_append_uses_the_rotation_of_the_head() -> None:
    rotation = rotations(3, 64)
    k = torch.randn(1, 1, 64).expand(4, 3, 64).contiguous()
    cache = new_cache(1, 3, 32, 64)
    ops.kv_append(k, k, None, None, rotation, cache, torch.arange(4))
    got = read_tokens(cache, torch.arange(4), 64)[0].dequantize()
    for head in range(3):
        exact = k[0, 0] @ rotation[head]
        assert (got[:, head] - exact).abs().max() < 0.3  # half a 4-bit step of about 5 / 15
        assert (got[:, head] - k[0, 0] @ rotation[head - 1]).abs().max() > 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("matrices", [0, 1, 3])
def test_kv_append_rotates_queries(matrices: int, head_dim: int) -> None:
    tokens, n_kv, n_q = 37, 3, 6
    cos, sin = cos_sin(tokens, head_dim)
    rotation = rotations(matrices, head_dim) if matrices else None
    slots = torch.randperm(64)[:tokens]
    slots[[0, 5]] = -1  # padding is rotated too
    for dtype in DTYPES:
        k = torch.randn(tokens, n_kv, head_dim).to(dtype)
        q = torch.randn(tokens, n_q, head_dim).to(dtype)
        cache = new_cache(1, n_kv, 64, head_dim)
        expected = cache.clone()
        ops.kv_append(k, k, cos, sin, rotation, expected, slots)
        got = ops.kv_append(k, k, cos, sin, rotation, cache, slots, q=q)
        assert torch.equal(cache, expected), "q changed the pages"
        assert got.dtype == torch.float32 and got.shape == q.shape
        first, second = q.double().chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1) * sin.double()[:, None]
        exact = q.double() * cos.double()[:, None] + across
        if rotation is not None:
            heads = rotation.double().expand(n_kv, -1, -1).repeat_interleave(2, dim=0)
            exact = torch.einsum("thd,hde->the", exact, heads)
        # head_dim products and sums, each rounded to float32: |error| <= (D + 3) 2^-24 |q| |U|,
        # where the columns of U and the rows have norms 1 and |q|.
        bound = (head_dim + 3) * 2.0**-24 * q.double().norm(dim=-1, keepdim=True) * 1.5
        assert ((got - exact).abs() <= bound).all()
        # Sharp: the rotation of another head, where there are several, or none at all, is refused.
        if matrices != 1:
            assert not ((got.roll(2, 1) - exact).abs() <= bound).all()


def test_kv_append_of_slices_of_one_tensor() -> None:
    for matrices in (1, 2):
        for dtype in DTYPES:
            together = torch.randn(37, (6 + 2 + 2) * 64).to(dtype)
            q, k, v = (x.unflatten(1, (-1, 64)) for x in together.split([384, 128, 128], dim=1))
            assert not k.is_contiguous()
            rest = (*cos_sin(37, 64), rotations(matrices, 64))
            cache = new_cache(2, 2, 32, 64)
            expected, slots = cache.clone(), torch.randperm(64)[:37]
            got = ops.kv_append(k, v, *rest, cache, slots, q=q)
            apart = (x.contiguous() for x in (k, v))
            wanted = ops.kv_append(*apart, *rest, expected, slots, q=q.contiguous())
            assert torch.equal(cache, expected) and torch.equal(got, wanted)


def test_kv_append_row_does_not_depend_on_the_batch() -> None:
    for matrices in (1, 5):
        k, v = torch.randn(37, 5, 128), torch.randn(37, 5, 128)
        cos, sin = cos_sin(37, 128)
        rotation = rotations(matrices, 128)
        slots = torch.randperm(64)[:37]
        whole = new_cache(1, 5, 64, 128)
        single = whole.clone()
        ops.kv_append(k, v, cos, sin, rotation, whole, slots)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            for begin, end in [(0, 1), (1, 3), (3, 6), (6, 10), (10, 37)]:
                part = slice(begin, end)
                rows = (x[part].contiguous() for x in (k, v, cos, sin))
                ops.kv_append(*rows, rotation, single, slots[part].contiguous())
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(whole, single)


@pytest.mark.parametrize("matrices", [1, 2])
def test_kv_append_skips_negative_slots(matrices: int) -> None:
    k, v = torch.randn(40, 2, 64), torch.randn(40, 2, 64)
    rotation = rotations(matrices, 64)
    slots = torch.randperm(96)[:40]
    skipped = torch.rand(40) < 0.5
    skipped[:9] = True  # whole blocks of rows too
    cache = new_cache(3, 2, 32, 64)
    expected = cache.clone()
    keep = ~skipped
    ops.kv_append(k, v, None, None, rotation, cache, torch.where(skipped, -1 - slots, slots))
    kept = (x[keep].contiguous() for x in (k, v))
    ops.kv_append(*kept, None, None, rotation, expected, slots[keep].contiguous())
    assert torch.equal(cache, expected)
    before = cache.clone()
    ops.kv_append(k, v, None, None, rotation, cache, torch.full((40,), -1))
    assert torch.equal(cache, before)


def test_kv_append_of_nothing() -> None:
    cache = new_cache(1, 2, 64, 64)
    before = cache.clone()
    empty = torch.empty(0, 2, 64)
    ops.kv_append(empty, empty, None, None, rotations(1, 64), cache, torch.empty(0).long())
    ops.kv_append(empty, empty, None, None, rotations(2, 64), cache, torch.empty(0).long())
    no_heads = torch.empty(3, 0, 64)
    ops.kv_append(no_heads, no_heads, None, None, None, cache[:, :0].contiguous(), torch.arange(3))
    queries = torch.empty(0, 4, 64)
    none = ops.kv_append(empty, empty, None, None, None, cache, torch.empty(0).long(), q=queries)
    assert none.shape == queries.shape
    heads = ops.kv_append(
        no_heads, no_heads, None, None, None, cache[:, :0].contiguous(), torch.arange(3), q=no_heads
    )
    assert heads.shape == no_heads.shape
    assert torch.equal(cache, before)


@pytest.mark.parametrize("matrices", [1, 2])
def test_kv_append_carries_nan_through_the_rotation(matrices: int) -> None:
    k, v = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    k[1, 0, 5] = torch.nan
    cache = new_cache(1, 2, 64, 64)
    ops.kv_append(k, v, None, None, rotations(matrices, 64), cache, torch.arange(3))
    got = read_tokens(cache, torch.arange(3), 64)[0].dequantize()
    assert got[1, 0].isnan().all()
    assert got[[0, 0, 1, 2, 2], [0, 1, 1, 0, 1]].isfinite().all()


def arguments() -> dict[str, object]:
    k, v = torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    cos, sin = cos_sin(4, 64)
    return {
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "key_rotation": rotations(1, 64),
        "cache": new_cache(2, 2, 32, 64),
        "slot_mapping": torch.arange(4),
        "hi_bits": 8,
        "q": torch.randn(4, 6, 64),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda t: t.double(), r"k: expected float32 or float16 or bfloat16.*got float64"),
        (
            "k",
            lambda t: t[0],
            r"k: expected float32 .*\[\*, \*, \*\] with .* heads, got .*\[2, 64\]",
        ),
        ("k", lambda t: t[..., :48].clone(), r"k: expected a head dimension .* of 64 or 128, got"),
        ("k", lambda t: t.transpose(0, 1), r"k: .*\(not contiguous\)"),
        ("v", lambda t: t[:1].expand(4, -1, -1), r"v: .*with contiguous heads.*\(not contiguous\)"),
        ("q", lambda t: torch.cat([t, t], -1)[..., :64], r"q: .*heads.*\(not contiguous\)"),
        ("v", lambda t: t[:3], r"v: expected float32 \[4, 2, 64\] with .* heads, got float32 \[3,"),
        ("v", lambda t: t.half(), r"v: expected float32 .*got float16"),
        ("cos", lambda t: None, r"cos: expected a tensor, because .* given, got None"),
        ("sin", lambda t: None, r"sin: expected a tensor, because .* given, got None"),
        (
            "cos",
            lambda t: t[:, :32].clone(),
            r"cos: expected .*\[4, 64\] contiguous, got .*\[4, 32",
        ),
        ("sin", lambda t: t[:3], r"sin: expected .*\[4, 64\] contiguous, got float32 \[3, 64\]"),
        (
            "key_rotation",
            lambda t: t[0],
            r"key_rotation: expected .*\[\*, 64, 64\] contiguous, got",
        ),
        ("key_rotation", lambda t: t.repeat(3, 1, 1), r"key_rotation: expected 1 or 2 \(the kv"),
        ("cache", lambda t: t.char(), r"cache: expected uint8 .*got int8"),
        (
            "cache",
            lambda t: t[:, :1].clone(),
            r"cache: expected uint8 \[\*, 2, \*\] contiguous, got",
        ),
        (
            "cache",
            lambda t: t[..., :-1].clone(),
            r"cache: expected pages of a multiple of 32 tokens",
        ),
        (
            "cache",
            lambda t: t[..., :0].clone(),
            r"cache: expected pages of a multiple of 32 tokens",
        ),
        ("slot_mapping", lambda t: t.int(), r"slot_mapping: expected int64 \[4\] .*got int32"),
        ("slot_mapping", lambda t: t[:2], r"slot_mapping: expected int64 \[4\] .*got int64 \[2\]"),
        (
            "slot_mapping",
            lambda t: t + 61,
            r"slot_mapping: expected slots below 64 .*got 64 for tok",
        ),
        ("hi_bits", lambda t: 6, r"hi_bits: expected 4 or 8, got 6"),
        ("q", lambda t: t.half(), r"q: expected float32 \[4, \*, 64\] with .* heads, got float16"),
        (
            "q",
            lambda t: t[:3],
            r"q: expected float32 \[4, \*, 64\] with .* heads, got float32 \[3,",
        ),
        ("q", lambda t: t[:, :5].clone(), r"q: expected a multiple of k's 2 heads, got .*\[4, 5"),
    ],
)
def test_kv_append_refuses_and_writes_nothing(name: str, change: object, message: str) -> None:
    values = arguments()
    values[name] = change(values[name])
    before = values["cache"].clone()
    with pytest.raises(RuntimeError, match="kv_append: " + message):
        ops.kv_append(**values)
    assert torch.equal(values["cache"], before)


def test_kv_append_passes_opcheck() -> None:
    values = arguments()
    torch.library.opcheck(torch.ops.resq.kv_append.default, tuple(values.values()))
    values.update(cos=None, sin=None, key_rotation=None, q=None)
    torch.library.opcheck(torch.ops.resq.kv_append.default, tuple(values.values()))


def test_kv_append_compiles_to_one_graph_for_every_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.kv_append, fullgraph=True, dynamic=True)
    for tokens in (4, 9):
        k, v = torch.randn(tokens, 2, 64), torch.randn(tokens, 2, 64)
        q = torch.randn(tokens, 4, 64)
        cache = new_cache(1, 2, 32, 64)
        expected = cache.clone()
        rotated = compiled(k, v, None, None, None, cache, torch.arange(tokens), 8, q)
        ops.kv_append(k, v, None, None, None, expected, torch.arange(tokens))
        assert torch.equal(rotated, q)
        assert torch.equal(cache, expected)
