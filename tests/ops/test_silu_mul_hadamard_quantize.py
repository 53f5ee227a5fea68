"""silu_mul_hadamard_quantize against its float64 evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from mixed_check import FLOAT_TYPES, UNIT, assert_quantizes, assert_same_mixed

from resq_kernels import hadamard as matrices
from resq_kernels import reference
from resq_kernels.formats import MixedTensor, pack_int4
from resq_kernels.ops import silu_mul_hadamard_quantize

SIZES = [1, 8, 24, 64, 336, 560, 1232, 4864]


def exact_rows(gate_up: torch.Tensor, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in float64, and how far float32 may be from them.

    silu is within 2.5e-7 relative (proved over all floats in tests/core); its product and the
    product with 1 / sqrt(n) round once each. Then the bound of the transform (test_hadamard.py).
    """
    gate, up = gate_up.double().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    bound = product.abs() * (2.5e-7 + 3 * UNIT)
    if not hadamard:
        return product, bound
    n = product.shape[-1]
    *orders, power = matrices.factors(n)
    depth = math.log2(power) + sum(2 + order / 4 for order in orders)
    bound = (bound + depth * UNIT * product.abs()).sum(-1, keepdim=True) * n**-0.5
    return matrices.transform(product), bound


def blocks_of(gate_up: torch.Tensor, n_hi: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`exact_rows` of a transform in blocks: of every block of the low part, the rest as it is."""
    gate, up = gate_up.chunk(2, dim=-1)
    n = gate.shape[-1]
    edges = sorted({*range(0, n - n_hi, block), n - n_hi, n})
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        columns = torch.cat([gate[..., start:end], up[..., start:end]], dim=-1)
        exact, bound = exact_rows(columns, end <= n - n_hi)
        parts.append((exact, bound.expand_as(exact)))
    exact, bound = (torch.cat(several, dim=-1) for several in zip(*parts, strict=True))
    return exact, bound


def inputs(n: int, dtype: torch.dtype, rows: int = 4) -> torch.Tensor:
    # silu of less than -87 is 0, and a row of one such value then has another range.
    return (torch.randn(rows, 2 * n) * 3 * torch.randn(rows, 1).exp()).clamp_min(-80).to(dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("hadamard", [False, True])
def test_silu_mul_hadamard_quantize_values(n: int, dtype: torch.dtype, hadamard: bool) -> None:
    gate_up = inputs(n, dtype)
    exact, bound = exact_rows(gate_up, hadamard)
    n_hi = n // 8
    assert_quantizes(silu_mul_hadamard_quantize(gate_up, hadamard), exact, bound)
    assert_quantizes(silu_mul_hadamard_quantize(gate_up, hadamard, n_hi), exact, bound)
    eight = silu_mul_hadamard_quantize(gate_up, hadamard, n_hi, lo_bits=8)
    assert_quantizes(eight, exact, bound, lo_bits=8)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(
    "n_lo, n_hi, block",
    [(256, 0, 256), (1280, 256, 256), (24, 8, 8), (40, 3, 8), (48, 5, 16), (96, 40, 32)]
    + [(192, 64, 64), (384, 1, 128), (4096, 768, 256), (0, 16, 64)],
)
def test_silu_mul_hadamard_quantize_in_blocks(
    dtype: torch.dtype, n_lo: int, n_hi: int, block: int
) -> None:
    gate_up = inputs(n_lo + n_hi, dtype)
    exact, bound = blocks_of(gate_up, n_hi, block)
    for lo_bits in (4, 8):
        actual = silu_mul_hadamard_quantize(gate_up, True, n_hi, lo_bits, hadamard_block=block)
        assert_quantizes(actual, exact, bound, lo_bits=lo_bits)
    whole = block == n_lo and n_hi == 0
    if whole:
        assert_same_mixed(actual, silu_mul_hadamard_quantize(gate_up, True, 0, lo_bits))
    packed = silu_mul_hadamard_quantize(gate_up, True, n_hi, packed=True, hadamard_block=block)
    plain = silu_mul_hadamard_quantize(gate_up, True, n_hi, packed=False, hadamard_block=block)
    assert_same_mixed(packed, plain._replace(q_lo=pack_int4(plain.q_lo)))


def test_silu_mul_hadamard_quantize_in_blocks_check_rejects_wrong_results() -> None:
    gate_up = inputs(1536, torch.float32)
    exact, bound = blocks_of(gate_up, 256, 256)
    wrong = [
        silu_mul_hadamard_quantize(gate_up, True, 256, hadamard_block=128),
        silu_mul_hadamard_quantize(gate_up, False, 256),
        silu_mul_hadamard_quantize(gate_up, True, 256),  # the whole row
        silu_mul_hadamard_quantize(gate_up.roll(1, dims=-1), True, 256, hadamard_block=256),
    ]
    for actual in wrong:
        with pytest.raises(AssertionError):
            assert_quantizes(actual, exact, bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_silu_mul_hadamard_quantize_in_blocks_not_finite(value: float) -> None:
    """A part is not finite if one of its own products is: the high part has no share in blocks."""
    for column, low in ((0, True), (55, True), (56, False), (63, False)):
        gate_up = torch.randn(3, 128)
        gate_up[1, column] = value
        actual = silu_mul_hadamard_quantize(gate_up, True, 8, hadamard_block=8)
        assert actual.params[:, 0].isnan().tolist() == [False, low, False]
        assert actual.params[:, 2].isnan().tolist() == [False, not low, False]


def test_silu_mul_hadamard_quantize_check_rejects_wrong_results() -> None:
    gate_up = inputs(336, torch.float32)
    exact, bound = exact_rows(gate_up, True)
    good = silu_mul_hadamard_quantize(gate_up, True, 42)
    assert_quantizes(good, exact, bound)
    one_off = good.q_lo.clone()
    one_off[2, 100] += 1 if one_off[2, 100] < 0 else -1
    no_hadamard = silu_mul_hadamard_quantize(gate_up, False, 42)
    gelu = torch.nn.functional.gelu(gate_up[:, :336]) * gate_up[:, 336:]
    wrong = reference.mixed_quantize(matrices.transform(gelu), 42)
    scale = good.params.clone()
    scale[1, 2] *= 1 + 1e-5
    for bad in (good._replace(q_lo=one_off), no_hadamard, wrong, good._replace(params=scale)):
        with pytest.raises(AssertionError):
            assert_quantizes(bad, exact, bound)


def test_silu_mul_hadamard_quantize_agrees_with_the_reference() -> None:
    """Codes differ only where float32 roundings decide a tie: at most one in a thousand."""
    gate_up = inputs(4864, torch.bfloat16, rows=16)
    actual = silu_mul_hadamard_quantize(gate_up)
    expected = reference.silu_mul_hadamard_quantize(gate_up)
    torch.testing.assert_close(actual.params, expected.params, rtol=2e-6, atol=0)
    difference = (actual.q_lo.int() - expected.q_lo.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3


def test_silu_mul_hadamard_quantize_options() -> None:
    gate_up = inputs(64, torch.float32)
    plain = silu_mul_hadamard_quantize(gate_up, True, 8)
    packed = silu_mul_hadamard_quantize(gate_up, True, 8, packed=True)
    assert_same_mixed(packed, plain._replace(q_lo=pack_int4(plain.q_lo)))
    exact, bound = exact_rows(gate_up, True)
    symmetric = silu_mul_hadamard_quantize(gate_up, True, 8, symmetric=True)
    assert (symmetric.params[:, [1, 3]] == 0).all()
    expected = exact[:, :56].abs().amax(-1) / 7
    error = (symmetric.params[:, 0].double() - expected).abs()
    assert (error <= bound[:, 0] / 7 + 3 * UNIT * expected).all()
    clipped = silu_mul_hadamard_quantize(gate_up, True, 8, symmetric=True, clip=0.5)
    assert torch.equal(clipped.params[:, 0], symmetric.params[:, 0] * 0.5)


def test_silu_mul_hadamard_quantize_extreme_gates() -> None:
    gates = torch.tensor([-3e38, -1e4, -89.0, -88.0, -87.0, -50.0, -1e-30, 0.0, 1e-30, 50.0, 1e4])
    gate_up = torch.cat([gates, torch.ones(11)]).unsqueeze(0)
    actual = silu_mul_hadamard_quantize(gate_up, False, 11)
    exact, bound = exact_rows(gate_up, False)
    assert_quantizes(actual, exact, bound + 3e-37)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 30, 64, 127])
def test_silu_mul_hadamard_quantize_not_finite(value: float, column: int) -> None:
    gate_up = torch.randn(3, 128)
    gate_up[1, column] = value
    actual = silu_mul_hadamard_quantize(gate_up, True, 8)
    assert actual.params[:, 0].isnan().tolist() == [False, True, False]
    assert actual.params[:, 2].isnan().tolist() == [False, True, False]
    assert not actual.q_lo[1].any() and not actual.q_hi[1].any()


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (2, 3, 1, 48)])
def test_silu_mul_hadamard_quantize_batch_shapes(shape: tuple[int, ...]) -> None:
    gate_up = torch.randn(shape)
    actual = silu_mul_hadamard_quantize(gate_up, True, 4)
    assert actual.q_lo.shape == (*shape[:-1], 20)
    assert actual.q_hi.shape == (*shape[:-1], 4)
    assert_quantizes(actual, *exact_rows(gate_up, True))


def test_silu_mul_hadamard_quantize_takes_any_strides() -> None:
    x = torch.randn(48, 5, 96)
    for view in (x.transpose(0, 1), x[..., ::2], x.permute(1, 2, 0), x[0, 0].expand(3, 96)):
        actual = silu_mul_hadamard_quantize(view, True, 4)
        assert_same_mixed(actual, silu_mul_hadamard_quantize(view.contiguous(), True, 4))


def test_silu_mul_hadamard_quantize_does_not_depend_on_the_batch() -> None:
    gate_up = inputs(560, torch.bfloat16, rows=70)
    whole = silu_mul_hadamard_quantize(gate_up)
    for i in (0, 33, 69):
        row = silu_mul_hadamard_quantize(gate_up[i])
        assert_same_mixed(row, MixedTensor(*(t[i] for t in whole)))


@pytest.mark.parametrize(
    "gate_up, options, sentence",
    [
        (torch.zeros(2, 8, dtype=torch.int8), {}, "gate_up: expected float32, float16 or bfloat16"),
        (torch.tensor(1.0), {}, "gate_up: expected at least one dimension"),
        (torch.zeros(2, 9), {}, "gate_up: expected an even last dimension (gate, then up), got"),
        (torch.zeros(2, 6), {}, "gate_up: expected rows of 2^a * m elements"),
        (torch.zeros(2, 8), {"n_hi": 5}, "n_hi: expected 0 to 4"),
        (torch.zeros(2, 8), {"lo_bits": 5}, "lo_bits: expected 4 or 8, got 5"),
        (torch.zeros(2, 8), {"clip": 2.0}, "clip: expected a factor in (0, 1]"),
        (torch.zeros(2, 8), {"n_hi": 1, "packed": True}, "packed: expected an even number"),
        (torch.zeros(2, 8), {"hadamard_block": 4}, "hadamard_block: expected 0 (the whole row) or"),
        (torch.zeros(2, 96), {"hadamard_block": 24}, "hadamard_block: expected 0 (the whole row)"),
        (torch.zeros(2, 1024), {"hadamard_block": 512}, "hadamard_block: expected 0 (the whole"),
        (torch.zeros(2, 96), {"hadamard_block": -8}, "hadamard_block: expected 0 (the whole row)"),
        (
            torch.zeros(2, 96),
            {"n_hi": 8, "hadamard_block": 16},
            "hadamard_block: expected a divisor of the 40 low columns, got 16",
        ),
        (
            torch.zeros(2, 96),
            {"hadamard": False, "hadamard_block": 16},
            "hadamard_block: expected 0 without hadamard, got 16",
        ),
    ],
)
def test_silu_mul_hadamard_quantize_errors(
    gate_up: torch.Tensor, options: dict, sentence: str
) -> None:
    with pytest.raises(RuntimeError) as error:
        silu_mul_hadamard_quantize(gate_up, **options)
    assert f"silu_mul_hadamard_quantize: {sentence}" in str(error.value)


def test_silu_mul_hadamard_quantize_without_hadamard_takes_any_size() -> None:
    gate_up = torch.randn(3, 14)  # 7 has no Hadamard matrix
    assert_quantizes(silu_mul_hadamard_quantize(gate_up, False), *exact_rows(gate_up, False))


@pytest.mark.parametrize("packed", [None, True])
def test_silu_mul_hadamard_quantize_opcheck(packed: bool | None) -> None:
    for dtype in FLOAT_TYPES:
        torch.library.opcheck(
            torch.ops.resq.silu_mul_hadamard_quantize.default,
            (torch.randn(3, 48).to(dtype),),
            {"n_hi": 4, "packed": packed},
        )
        torch.library.opcheck(
            torch.ops.resq.silu_mul_hadamard_quantize.default,
            (torch.randn(3, 48).to(dtype),),
            {"n_hi": 8, "packed": packed, "hadamard_block": 16},
        )


def test_silu_mul_hadamard_quantize_compiles() -> None:
    compiled = torch.compile(
        lambda x: silu_mul_hadamard_quantize(x * 2), fullgraph=True, backend="aot_eager"
    )
    for rows in (3, 5):
        gate_up = torch.randn(rows, 48)
        assert_same_mixed(compiled(gate_up), silu_mul_hadamard_quantize(gate_up * 2))
