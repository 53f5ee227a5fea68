"""kv_append on CUDA: byte for byte what the CPU's operator writes, and no other byte."""

from __future__ import annotations

import emulation
import pytest
import torch
from kv_cases import DTYPES, HEAD_DIMS, cos_sin, rotated_queries, rotations

from resq_kernels import kv_pages, ops
from resq_kernels.reference.attention import attend
from resq_kernels.reference.kv_pages import read_tokens


def new_cache(pages: int, n_kv: int, page_size: int, head_dim: int) -> torch.Tensor:
    shape = kv_pages.cache_shape(pages, n_kv, page_size, head_dim)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_rows(tokens: int, n_kv: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    scale = torch.exp2(torch.randint(-20, 12, (tokens, n_kv, 1)).float())
    return (torch.randn(tokens, n_kv, head_dim) * scale + torch.randn(tokens, n_kv, 1)).to(dtype)


def check(device: emulation.Emulated, k, v, cos, sin, rotation, cache, slots, hi_bits=8) -> None:
    """Appends on both devices and compares the whole cache."""
    expected = cache.clone()
    ops.kv_append(k, v, cos, sin, rotation, expected, slots, hi_bits)
    device.kv_append(k, v, cos, sin, rotation, cache, slots, hi_bits)
    assert torch.equal(cache, expected)


# 7 tokens: a row a thread; 67 tokens of 3 heads: eight rows a thread, the last block half empty.
@pytest.mark.parametrize("tokens", [1, 7, 67])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_append_writes_the_cpu_s_bytes(
    device: emulation.Emulated, dtype: torch.dtype, head_dim: int, tokens: int
) -> None:
    n_kv, page_size = 3, 32
    cos, sin = cos_sin(tokens, head_dim)
    cache = new_cache(3, n_kv, page_size, head_dim)
    for matrices, angles, hi_bits in [(0, False, 8), (1, True, 8), (3, True, 4), (1, False, 8)]:
        k, v = (random_rows(tokens, n_kv, head_dim, dtype) for _ in "kv")
        other = DTYPES[(DTYPES.index(dtype) + matrices) % 3]
        rotation = rotations(matrices, head_dim).to(other) if matrices else None
        given = (cos.to(other), sin.to(dtype)) if angles else (None, None)
        slots = torch.randperm(3 * page_size)[:tokens]
        slots[torch.rand(tokens) < 0.2] = -1
        check(device, k, v, *given, rotation, cache, slots, hi_bits)


# 3 tokens: a row a thread; 70 tokens of 8 heads: eight rows a thread.
@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kv_append_rotates_queries(device: emulation.Emulated, head_dim: int, tokens: int) -> None:
    n_kv, n_q, page_size = 2, 6, 32
    cos, sin = cos_sin(tokens, head_dim)
    for dtype, matrices in zip(DTYPES, (0, 1, 2), strict=True):
        k, q = (torch.randn(tokens, n, head_dim).to(dtype) for n in (n_kv, n_q))
        rotation = rotations(matrices, head_dim).half() if matrices else None
        cache = new_cache(3, n_kv, page_size, head_dim)
        expected = cache.clone()
        slots = torch.randperm(3 * page_size)[:tokens]
        slots[0] = -1
        on_cpu = ops.kv_append(k, k, cos, sin, rotation, expected, slots, 8, q)
        got = device.kv_append(k, k, cos, sin, rotation, cache, slots, 8, q)
        assert torch.equal(cache, expected), "q changed the pages"
        # RoPE has the CPU's bits; the sum of the rotation is fused here and not there: each of its
        # head_dim steps rounds by at most 2^-24 of the row's norm on either side.
        bound = 2 * head_dim * 2.0**-24 * q.float().norm(dim=-1, keepdim=True) if matrices else 0.0
        assert ((got - on_cpu).abs() <= bound).all()
        assert not ((got.roll(n_q // n_kv, 1) - on_cpu).abs() <= bound).all()


def test_kv_append_and_kv_attention_of_slices_are_float64_attention(
    device: emulation.Emulated,
) -> None:
    """A layer's two calls; on the way, q' and pages have the bits of contiguous tensors."""
    tokens, n_kv, n_q = 21, 2, 4
    cos, sin = cos_sin(tokens, 64)
    # Slices of one tensor, as a fused projection returns them.
    together = torch.randn(tokens, (n_q + n_kv) * 64).half()
    q, k = (x.unflatten(1, (-1, 64)) for x in together.split([n_q * 64, n_kv * 64], dim=1))
    rest, slots = (cos, sin, rotations(2, 64).half()), torch.arange(tokens)
    cache = new_cache(1, n_kv, 32, 64)
    rotated = device.kv_append(k, k, *rest, cache, slots, 8, q)
    alone, exact_q = rotated_queries(q.contiguous(), n_kv, *rest, device.kv_append)
    assert torch.equal(rotated, alone)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    where = (torch.zeros(1, 1, dtype=torch.int32), starts[1:], starts, 0.125)
    got = device.kv_attention(rotated, cache, *where, torch.float16)
    rows = [x.dequantize().double() for x in read_tokens(cache, slots, 64)]
    exact = attend(exact_q, *rows, 0.125)
    # 4-bit rounding moves a row by 10 % of its norm; the kernel may add 2 % of that.
    bound = 2e-3 * exact.norm(dim=-1)
    assert ((got - exact).norm(dim=-1) <= bound).all()
    of_another = device.kv_attention(rotated.roll(1, 1), cache, *where, torch.float16)
    assert not ((of_another - exact)[1:].norm(dim=-1) <= bound[1:]).any()
    again = new_cache(1, n_kv, 32, 64)
    ops.kv_append(k, k, *rest, again, slots)
    tokens_of = [read_tokens(c, slots, 64)[0] for c in (cache, again)]
    assert torch.equal(tokens_of[0].codes, tokens_of[1].codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("hi_bits", [8, 4])
def test_kv_append_of_rows_that_are_hard_to_quantize(
    sm80: emulation.Emulated, head_dim: int, hi_bits: int
) -> None:
    for page_size in (16, 64, 128) if head_dim == 128 else (32, 128):
        k, v = (torch.randn(page_size, 1, head_dim) for _ in "kv")
        k[0] = 6e4  # constant
        k[1, 0, 1], k[2, 0, head_dim - 1], v[3, 0, 0] = torch.nan, torch.inf, -torch.inf
        v[4] *= 1e9  # saturates
        v[5] *= 1e-7  # subnormal scales
        k[6], k[7], v[8] = 0.0, -0.0, torch.randn(head_dim).sign() * 0.0
        k[9] = torch.arange(head_dim) % 31 / 2  # ties
        k[10].view(torch.int32)[0, 2] = -1  # a NaN below -infinity
        k[11] *= 1e-42  # subnormal float32 numbers
        v[12] = 3.0
        v[12, 0, 5] += 2.0**-22  # the smallest range
        slots = torch.randperm(2 * page_size)[:page_size]
        check(sm80, k, v, None, None, None, new_cache(2, 1, page_size, head_dim), slots, hi_bits)


def test_kv_append_shows_one_step_of_one_number(sm80: emulation.Emulated) -> None:
    """The comparison above is sharp: one 4-bit step more in one dim is another byte."""
    k = torch.randn(1, 1, 128)
    caches = []
    for delta in (0.0, 1.0):
        moved = k.clone()
        step = (k[..., :112].max() - k[..., :112].min()) / 15
        moved[0, 0, k[0, 0, :112].abs().argmin()] += delta * step * 1.01
        caches.append(torch.zeros(kv_pages.cache_shape(1, 1, 16, 128), dtype=torch.uint8))
        sm80.kv_append(moved, k, None, None, None, caches[-1], torch.tensor([3]))
    assert (caches[0] != caches[1]).sum() == 1


def test_kv_append_of_nothing(device: emulation.Emulated) -> None:
    cache = new_cache(1, 2, 64, 64)
    before = cache.clone()
    empty = torch.empty(0, 2, 64)
    device.kv_append(
        empty, empty, None, None, rotations(1, 64), cache, torch.empty(0, dtype=torch.long)
    )
    rows = torch.randn(3, 2, 64)
    device.kv_append(rows, rows, None, None, None, cache, torch.full((3,), -1))
    no_heads = torch.empty(3, 0, 64)
    device.kv_append(
        no_heads, no_heads, None, None, None, cache[:, :0].contiguous(), torch.arange(3)
    )
    assert torch.equal(cache, before)


def test_kv_append_stops_at_a_slot_beyond_the_cache(sm80: emulation.Emulated) -> None:
    cache, rows = new_cache(2, 1, 32, 64), torch.randn(2, 1, 64)
    with emulation.stopped_by_trap():
        sm80.kv_append(rows, rows, None, None, None, cache, torch.tensor([3, 64]))


def test_kv_append_refuses_before_any_launch(device: emulation.Emulated) -> None:
    k, cache = torch.randn(4, 2, 64), new_cache(1, 2, 32, 64)
    slots = torch.arange(4)
    wrong = [
        ((k, k[:3], None, None, None, cache, slots), r"v: expected float32 \[4, 2, 64\]"),
        ((k, k, k[:, 0], None, None, cache, slots), "sin: expected a tensor, because"),
        ((k, k, None, None, None, cache.char(), slots), "cache: expected uint8 .*got int8"),
        ((k, k, None, None, None, cache, slots.int()), "slot_mapping: expected int64"),
        ((k, k, None, None, None, cache, slots, 6), "hi_bits: expected 4 or 8, got 6"),
        (
            (torch.randn(513)[1:].view(4, 2, 64), k, None, None, None, cache, slots),
            "k: expected memory aligned to 16 bytes",
        ),
        (
            (torch.randn(4, 129)[:, :128].view(4, 2, 64), k, None, None, None, cache, slots),
            "k: expected tokens a multiple of 16 bytes apart, got 516 bytes",
        ),
    ]
    for arguments, message in wrong:
        with pytest.raises(RuntimeError, match="kv_append: " + message):
            device.kv_append(*arguments)
