"""The bytes of a page: places are bijections, and tiles are A operands of the tensor cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resq_kernels import kv_pages, reference
from resq_kernels.reference.kv_pages import quantize_rows, read_tokens, write_tokens

HEAD_DIMS = [64, 128]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["k", "v"])
def test_places_fill_the_tile_and_no_byte_holds_two_tokens(kind: str, head_dim: int) -> None:
    byte, shift, mask = kv_pages.place_table(kind, head_dim)
    bits: set[tuple[int, int]] = set()
    owners: dict[int, set[int]] = {}
    for token in range(kv_pages.tile_tokens(head_dim)):
        for dim in range(head_dim):
            place = int(byte[token, dim]), int(shift[token, dim]), int(mask[token, dim])
            assert (place[2] == 255) == (dim >= kv_pages.low_dims(head_dim))
            width = 8 if place[2] == 255 else 4
            bits |= {(place[0], place[1] + bit) for bit in range(width)}
            owners.setdefault(place[0], set()).add(token)
    assert bits == {(b, bit) for b in range(kv_pages.TILE_BYTES) for bit in range(8)}
    assert all(len(tokens) == 1 for tokens in owners.values())


def tile_words(kind: str, codes: np.ndarray) -> np.ndarray:
    """Codes [tokens, D] -> the tile's words [9, 32 lanes]."""
    byte, shift, _ = (table.numpy() for table in kv_pages.place_table(kind, codes.shape[1]))
    tile = np.zeros(kv_pages.TILE_BYTES, np.uint8)
    np.bitwise_or.at(tile, byte, (codes << shift).astype(np.uint8))
    first, second = tile[:512].view("<u4").reshape(32, 4), tile[512:1024].view("<u4").reshape(32, 4)
    return np.stack([*first.T, *second.T, tile[1024:].view("<u4")])


def registers(word: int) -> list[tuple[int, int]]:
    """The four registers of a word, (low half, high half): five logic instructions."""
    shifted = word >> 8
    parts = [word & 0x000F000F, (word & 0x00F000F0) >> 4]
    parts += [shifted & 0x000F000F, (shifted & 0x00F000F0) >> 4]
    return [(part & 0xFFFF, part >> 16) for part in parts]


def byte_registers(word: int) -> list[tuple[int, int]]:
    """The two registers of a word of 8-bit codes: one byte permutation each."""
    return [(word & 255, word >> 8 & 255), (word >> 16 & 255, word >> 24)]


def operand(lanes: list[list[tuple[int, int]]]) -> np.ndarray:
    """A registers of 32 lanes -> the matrix of mma.m16n8k16 (4 registers) or m16n8k8 (2).

    PTX: lane 4 g + i holds rows g and g + 8, columns (2 i, 2 i + 1), then the same 8 columns on.
    """
    a = np.zeros((16, 8 * (len(lanes[0]) // 2)), np.int64)
    for lane, values in enumerate(lanes):
        g, i = divmod(lane, 4)
        for n, pair in enumerate(values):
            row, column = g + 8 * (n % 2), 2 * i + 8 * (n // 2)
            a[row, column : column + 2] = pair
    return a


def rows_then_columns(top: list, bottom: list) -> list:
    """Registers of rows g and of rows g + 8, each in column order -> the order of the operand."""
    return [pair for pairs in zip(top, bottom, strict=True) for pair in pairs]


def k_operands_128(w: list[int]) -> tuple[list, list]:
    """The lane's registers of the 7 k16 steps of low dims, and of the one of high dims."""
    rows = [[r for word in w[3 * h : 3 * h + 3] for r in registers(word)] for h in (0, 1)]
    last = registers(w[6])
    low = [
        rows_then_columns(rows[0][2 * s : 2 * s + 2], rows[1][2 * s : 2 * s + 2]) for s in range(6)
    ]
    low.append(rows_then_columns(last[:2], last[2:]))
    return low, [rows_then_columns(byte_registers(w[7]), byte_registers(w[8]))]


def test_k_tile_128_feeds_m16n8k16() -> None:
    rng = np.random.default_rng()
    codes = np.concatenate([rng.integers(0, 16, (16, 112)), rng.integers(0, 256, (16, 16))], 1)
    q = rng.integers(-5, 6, (8, 128))
    words = tile_words("k", codes)
    lanes = [k_operands_128([int(x) for x in words[:, lane]]) for lane in range(32)]
    low = [operand([lane[0][s] for lane in lanes]) for s in range(7)]
    high = operand([lane[1][0] for lane in lanes])
    score = sum(a @ q[:, 16 * s : 16 * s + 16].T for s, a in enumerate(low))
    assert np.array_equal(score, codes[:, :112] @ q[:, :112].T)
    assert np.array_equal(high @ q[:, 112:].T, codes[:, 112:] @ q[:, 112:].T)


def v_operands_128(w: list[int]) -> list:
    """The lane's registers of the 8 m16 tiles of dims; columns are tokens."""
    halves = [[r for word in w[3 * h : 3 * h + 3] for r in registers(word)] for h in (0, 1)]
    last = registers(w[6])
    for h in (0, 1):
        halves[h] += last[2 * h : 2 * h + 2] + byte_registers(w[7 + h])
    return [halves[0][2 * m : 2 * m + 2] + halves[1][2 * m : 2 * m + 2] for m in range(8)]


def test_v_tile_128_feeds_m16n8k16() -> None:
    rng = np.random.default_rng()
    codes = np.concatenate([rng.integers(0, 16, (16, 112)), rng.integers(0, 256, (16, 16))], 1)
    p = rng.integers(0, 7, (16, 8))
    words = tile_words("v", codes)
    lanes = [v_operands_128([int(x) for x in words[:, lane]]) for lane in range(32)]
    out = np.concatenate([operand([lane[m] for lane in lanes]) @ p for m in range(8)])
    assert np.array_equal(out, codes.T @ p)


def codes_64() -> np.ndarray:
    rng = np.random.default_rng()
    return np.concatenate([rng.integers(0, 16, (32, 56)), rng.integers(0, 256, (32, 8))], 1)


def test_k_tile_64_feeds_three_k16_steps_and_two_k8_steps() -> None:
    codes, q = codes_64(), np.random.default_rng().integers(-5, 6, (8, 64))
    words = tile_words("k", codes)
    for group in range(2):  # an m16 tile of tokens each
        steps: list[list] = [[] for _ in range(3)]
        tail, high = [], []
        for lane in range(32):
            w = [int(x) for x in words[:, lane]]
            top, bottom = registers(w[3 * group]), registers(w[3 * group + 1])
            shared = registers(w[3 * group + 2])
            for s in range(2):
                halves = top[2 * s : 2 * s + 2], bottom[2 * s : 2 * s + 2]
                steps[s].append(rows_then_columns(*halves))
            steps[2].append(rows_then_columns(shared[:2], shared[2:]))
            # One byte permutation copies byte b into both halves, one AND (0x00f0000f) leaves code
            # 2 i in the low half and 16 times code 2 i + 1 in the high one.
            both = [w[6] >> 8 * (2 * group + r) & 255 for r in range(2)]
            tail.append([(byte & 15, (byte & 0xF0) >> 4) for byte in both])
            high.append(byte_registers(w[7 + group]))
        tokens = slice(16 * group, 16 * group + 16)
        low = sum(operand(steps[s]) @ q[:, 16 * s : 16 * s + 16].T for s in range(3))
        low = low + operand(tail) @ q[:, 48:56].T
        assert np.array_equal(low, codes[tokens, :56] @ q[:, :56].T)
        assert np.array_equal(operand(high) @ q[:, 56:].T, codes[tokens, 56:] @ q[:, 56:].T)


def test_v_tile_64_feeds_m16n8k16() -> None:
    codes, p = codes_64(), np.random.default_rng().integers(0, 7, (32, 8))
    words = tile_words("v", codes)
    blocks = [np.zeros((16, 8), np.int64) for _ in range(3)]
    high, tail = np.zeros((16, 8), np.int64), []
    for lane in range(32):
        tail.append([registers(int(words[6, lane]))[n] for n in range(4)])
    for group in range(2):  # a k16 step of tokens each
        tokens = p[16 * group : 16 * group + 16]
        a: list[list] = [[] for _ in range(3)]
        h = []
        for lane in range(32):
            w = [int(x) for x in words[:, lane]]
            first, second = registers(w[3 * group]), registers(w[3 * group + 1])
            shared = registers(w[3 * group + 2])
            for m in range(2):
                a[m].append(first[2 * m : 2 * m + 2] + second[2 * m : 2 * m + 2])
            a[2].append(shared)
            pairs = byte_registers(w[7 + group])
            h.append([pairs[0], (0, 0), pairs[1], (0, 0)])  # rows g + 8 are empty
        for m in range(3):
            blocks[m] += operand(a[m]) @ tokens
        high += operand(h) @ tokens
    expected = codes.T @ p
    assert np.array_equal(np.concatenate(blocks), expected[:48])
    assert np.array_equal(high[:8], expected[56:])
    # The same A operand meets both halves of the tokens; rows g < 4 and g + 8 of it belong to the
    # first half and the others to the second; row g % 4 is dim 48 + g % 4 (+ 4 for rows g + 8).
    first, second = operand(tail) @ p[:16], operand(tail) @ p[16:]
    low = first[[0, 1, 2, 3, 8, 9, 10, 11]] + second[[4, 5, 6, 7, 12, 13, 14, 15]]
    assert np.array_equal(low, expected[48:56])


@pytest.mark.parametrize("hi_bits", [8, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_write_and_read_are_inverse_for_every_position(head_dim: int, hi_bits: int) -> None:
    for page_size in (32, 64, 96):
        shape = kv_pages.cache_shape(3, 2, page_size, head_dim)
        assert shape[2] == page_size * {64: 88, 128: 160}[head_dim]
        cache = torch.randint(0, 256, shape, dtype=torch.uint8)
        slots = torch.randperm(3 * page_size)
        rows = [quantize_rows(torch.randn(len(slots), 2, head_dim), hi_bits) for _ in "kv"]
        write_tokens(cache, slots, *rows)
        for read, written in zip(read_tokens(cache, slots, head_dim), rows, strict=True):
            assert torch.equal(read.codes, written.codes)
            assert torch.equal(read.ranges, written.ranges)
        # Every byte was written: a cache of other garbage becomes the same.
        again = torch.full(shape, 255, dtype=torch.uint8)
        write_tokens(again, slots, *rows)
        assert torch.equal(again, cache)


def parts(x: torch.Tensor, hi_bits: int) -> list[tuple[slice, int]]:
    low, dims = kv_pages.low_dims(x.shape[-1]), x.shape[-1]
    return (
        [(slice(0, dims), 15)] if hi_bits == 4 else [(slice(0, low), 15), (slice(low, dims), 255)]
    )


def rows_of_every_kind(head_dim: int) -> torch.Tensor:
    """Magnitudes from float16's subnormals to its largest, with and without a large mean."""
    scale = 2.0 ** torch.arange(-26.0, 14.0)
    centred = torch.randn(40, head_dim) * scale[:, None]
    shifted = torch.randn(40, head_dim) + torch.linspace(-60000, 60000, 40)[:, None]
    return torch.cat([centred, shifted, centred.abs(), -centred.abs()])


@pytest.mark.parametrize("hi_bits", [8, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantization_error_is_at_most_half_a_step(head_dim: int, hi_bits: int) -> None:
    x = rows_of_every_kind(head_dim)
    rows = quantize_rows(x, hi_bits)
    error = (rows.dequantize().double() - x.double()).abs()
    for index, (dims, levels) in enumerate(parts(x, hi_bits)):
        scale = rows.ranges[..., 2 * index, None].double() / kv_pages.SCALE_FACTOR
        # float32: x - offset and the dequantized sum round by 2^-24 of the largest magnitude.
        slack = 2.0**-22 * x[:, dims].abs().amax(-1, keepdim=True).double()
        assert (error[:, dims] <= scale / 2 + slack).all()
        # And the step is no wider than float16 forces it to be: one float16 step of the offset
        # more range, one float16 step of the scale.
        span = x[:, dims].amax(-1, keepdim=True) - x[:, dims].amin(-1, keepdim=True)
        offset_step = x[:, dims].abs().amax(-1, keepdim=True) * 2.0**-10 + 2.0**-24
        widest = (span + offset_step) / levels * (1 + 2.0**-10) + 2.0**-24 / kv_pages.SCALE_FACTOR
        assert (scale <= widest * (1 + 1e-6)).all()


def test_rounding_the_offset_to_nearest_would_break_the_bound() -> None:
    """What rounding down buys: a minimum of 1000.3 becomes 1000.5, above some values."""
    x = 1000.3 + 0.3 * torch.rand(64, 112)
    nearest = x.amin(-1, keepdim=True).half().float()
    scale = (x.amax(-1, keepdim=True) - nearest).clamp_min(0) / 15
    codes = torch.where(scale > 0, (x - nearest) / scale, 0.0).round().clamp(0, 15)
    assert ((nearest + scale * codes - x).abs() > scale / 2 + 2.0**-22 * 1000).any()


@pytest.mark.parametrize("hi_bits", [8, 4])
def test_special_rows(hi_bits: int) -> None:
    x = torch.randn(8, 64)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 2.5  # a float16: exact
    x[3] = 1e6
    x[4, :4] = torch.tensor([1e30, -1e30, 7e4, -7e4])
    x[5, 3] = torch.nan
    x[6, 63] = torch.inf
    x[7, 0] = -torch.inf
    y = reference.kv_fake_quantize(x, hi_bits)
    assert torch.equal(y[0], torch.zeros(64)) and torch.equal(y[1], torch.zeros(64))
    assert not torch.signbit(y[:2]).any()
    assert torch.equal(y[2], x[2])
    assert torch.equal(y[3], torch.full((64,), 65504.0))
    assert y[4].isfinite().all() and torch.equal(y[4, [1, 3]], torch.tensor([-65504.0] * 2))
    for row, dim in ((5, 3), (6, 63), (7, 0)):
        for dims, _ in parts(x, hi_bits):
            bad = dims.start <= dim < dims.stop
            assert y[row, dims].isnan().all() if bad else y[row, dims].isfinite().all()


def test_uniform_mode_has_one_range() -> None:
    x = torch.randn(5, 128)
    x[:, 127] = 9.0  # widens the range of all dims
    rows = quantize_rows(x, 4)
    assert rows.codes.max() == 15
    assert torch.equal(rows.ranges[:, :2], rows.ranges[:, 2:])
    assert (rows.codes[:, 127] == 15).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kv_pages.low_dims(96), "head_dim: expected 64 or 128, got 96"),
        (lambda: kv_pages.cache_shape(1, 1, 24, 128), "page_size: expected .* multiple of 16 .*24"),
        (lambda: kv_pages.cache_shape(1, 1, 16, 64), "page_size: expected .* multiple of 32 .*16"),
        (lambda: kv_pages.cache_shape(1, 1, 0, 64), "page_size: expected a positive multiple"),
        (lambda: quantize_rows(torch.ones(64), 5), "hi_bits: expected 4 or 8, got 5"),
        (
            lambda: kv_pages.page_size_of(torch.empty(1, 1, 100, dtype=torch.uint8), 64),
            "cache: expected pages of a multiple of 32 tokens of 88 bytes, got 100 bytes",
        ),
    ],
)
def test_kv_pages_refuses(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
