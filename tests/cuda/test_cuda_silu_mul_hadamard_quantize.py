"""silu_mul_hadamard_quantize on CUDA: the CPU's bits where every addition is the CPU's, else codes
that differ at ties and the float64 evaluation within a derived bound."""

from __future__ import annotations

import emulation
import pytest
import torch
from mixed_check import FLOAT_TYPES, UNIT, assert_quantizes, assert_same_mixed
from test_cuda_hadamard import IN_THREAD, MLP_WIDTHS, adds_like_the_cpu

from resq_kernels import hadamard as matrices
from resq_kernels import reference
from resq_kernels.formats import MixedTensor

SIZES = [1, 2, 8, 24, 64, 336, 72, 76, 560, 1232, 1024, 344, 500, *MLP_WIDTHS]


def depth(n: int) -> float:
    """Roundings, in units of 2^-24 of a sum of magnitudes: test_cuda_hadamard.error_bound."""
    *orders, power = matrices.factors(n)
    result = power.bit_length() - 1.0
    for order in orders:
        result += 2 + order / 4 if order in IN_THREAD else 3 * (order / 16 + 1) * 34
    return result


def exact_rows(gate_up: torch.Tensor, hadamard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in float64, and how far float32 may be from them (tests/ops)."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    bound = product.abs() * (2.5e-7 + 3 * UNIT)
    if not hadamard:
        return product, bound
    n = product.shape[-1]
    bound = (bound + depth(n) * UNIT * product.abs()).sum(-1, keepdim=True) * n**-0.5
    return matrices.transform(product), bound


def inputs(n: int, dtype: torch.dtype, rows: int = 2) -> torch.Tensor:
    # silu of less than -87 is 0, and a row of one such value then has another range.
    return (torch.randn(rows, 2 * n) * 3 * torch.randn(rows, 1).exp()).clamp_min(-80).to(dtype)


def run(device: emulation.Emulated, gate_up: torch.Tensor, *options, **named) -> MixedTensor:
    named.setdefault("packed", False)
    actual = MixedTensor(*device.silu_mul_hadamard_quantize(gate_up, *options, **named))
    expected = torch.ops.resq.silu_mul_hadamard_quantize(gate_up, *options, **named)
    expected = MixedTensor(*expected)
    n = gate_up.shape[-1] // 2
    if (options and not options[0]) or "hadamard_block" in named or adds_like_the_cpu(n):
        assert_same_mixed(actual, expected)
    return actual


@pytest.mark.parametrize("n", SIZES)
def test_silu_mul_hadamard_quantize_values(sm90: emulation.Emulated, n: int) -> None:
    dtype = FLOAT_TYPES[n // 4 % 3]
    gate_up = inputs(n, dtype, rows=2 if n < 5000 else 1)
    n_hi = 0 if n % 16 else n // 8
    actual = run(sm90, gate_up, True, n_hi, packed=n % 2 == 0)
    assert_quantizes(actual, *exact_rows(gate_up, True))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("hadamard", [False, True])
def test_silu_mul_hadamard_quantize_types_and_options(
    device: emulation.Emulated, dtype: torch.dtype, hadamard: bool
) -> None:
    for n, n_hi in ((64, 8), (36, 5), (12, 12), (336, 1)):
        gate_up = inputs(n, dtype, rows=3)
        exact, bound = exact_rows(gate_up, hadamard)
        assert_quantizes(run(device, gate_up, hadamard, n_hi), exact, bound)
        assert_quantizes(run(device, gate_up, hadamard, n_hi, 8), exact, bound, lo_bits=8)
        run(device, gate_up, hadamard, n_hi, symmetric=True, clip=0.5)


def test_silu_mul_hadamard_quantize_without_hadamard_takes_any_size(
    sm90: emulation.Emulated,
) -> None:
    for n in (0, 1, 7, 14, 1000, 4100):
        for n_hi in (0, n // 3):
            run(sm90, inputs(n, torch.bfloat16), False, n_hi)


# Low columns, high columns, block. Eight columns are a lane's, 256 a warp's.
BLOCKS = [
    (0, 8, 8),
    (8, 0, 8),
    (16, 8, 16),
    (24, 0, 8),
    (32, 16, 32),
    (64, 0, 64),
    (192, 8, 64),
    (256, 8, 256),
    (384, 24, 128),
    (1280, 256, 256),
    (4096, 768, 256),
    (4096, 768, 32),
]
# Parts that are not whole runs of eight columns: each number is loaded and stored on its own.
UNALIGNED = [(8, 1, 8), (16, 4, 16), (256, 5, 128), (512, 30, 256)]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_silu_mul_hadamard_quantize_blocks_have_the_cpus_bits(
    sm90: emulation.Emulated, dtype: torch.dtype
) -> None:
    for low, high, block in BLOCKS + UNALIGNED:
        gate_up = inputs(low + high, dtype, rows=3 if low < 1000 else 1)
        for packed in (False, True):
            run(sm90, gate_up, True, high, packed=packed, hadamard_block=block)


def test_silu_mul_hadamard_quantize_blocks_with_options(device: emulation.Emulated) -> None:
    for low, high, block in ((128, 16, 32), (64, 3, 64)):
        gate_up = inputs(low + high, torch.bfloat16)
        run(device, gate_up, True, high, 8, hadamard_block=block)
        run(device, gate_up, True, high, symmetric=True, clip=0.5, hadamard_block=block)
    for low, high in ((256, 8), (48, 1)):  # and without a transform
        gate_up = inputs(low + high, torch.float16)
        run(device, gate_up, False, high, 8)
        run(device, gate_up, False, high, packed=True)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (7168, 1024, torch.bfloat16),
        (12544, 1792, torch.float16),
        (18944, 256, torch.bfloat16),
        (33024, 256, torch.float16),
    ],
)
def test_silu_mul_hadamard_quantize_blocks_of_long_rows(
    device: emulation.Emulated, low: int, high: int, dtype: torch.dtype
) -> None:
    """Held in four and in eight runs a thread, and computed twice."""
    run(device, inputs(low + high, dtype, rows=1), True, high, packed=True, hadamard_block=256)


@pytest.mark.parametrize(
    ("low", "high", "rows", "sms", "parts"),
    [
        (1792, 256, 1, 132, 1),
        (3840, 256, 2, 132, 2),
        (7168, 1024, 1, 132, 4),
        (8448, 0, 1, 132, 8),  # of 33 warps of columns: the last part has none
        (12544, 1792, 1, 132, 8),
        (12544, 1792, 3, 8, 2),  # as many parts as there are multiprocessors for them
        (8192, 5, 1, 132, 8),
    ],
)
def test_silu_mul_hadamard_quantize_a_cluster_shares_a_row(
    sm90: emulation.Emulated, low: int, high: int, rows: int, sms: int, parts: int
) -> None:
    device = emulation.Emulated(sm90.arch, sms=sms)
    dtype = FLOAT_TYPES[parts % 3]
    gate_up = inputs(low + high, dtype, rows)
    gate_up[:, low // 2] = float("nan")  # of one part; the other parts know
    for _ in range(2):
        emulation.events()
        actual = run(device, gate_up, True, high, packed=True, hadamard_block=128)
        cluster = f" cluster {parts}" if parts > 1 else ""
        assert emulation.events("cudaLaunch") == [f"cudaLaunchKernelExC{cluster} pdl"]
        assert actual.params[:, 0].isnan().any() == gate_up.isnan().any()
        gate_up = inputs(low + high, dtype, rows)


def test_silu_mul_hadamard_quantize_older_code_has_no_clusters(sm80: emulation.Emulated) -> None:
    emulation.events()
    run(sm80, inputs(8192, torch.bfloat16, 1), True, 0, hadamard_block=256)
    assert "cluster" not in emulation.events("cudaLaunch")[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_silu_mul_hadamard_quantize_blocks_not_finite(
    sm90: emulation.Emulated, value: float
) -> None:
    """A part that is not finite leaves the other as it is, in the same warp too."""
    low, high = 64, 16
    n = low + high
    for column in (0, low - 1, low, n - 1, n, n + low, 2 * n - 1):
        for dtype in (torch.float32, torch.bfloat16):
            gate_up = torch.randn(3, 2 * n).to(dtype)
            gate_up[1, column] = value
            actual = run(sm90, gate_up, True, high, hadamard_block=32)
            lost = actual.params[:, [0, 2]].isnan().tolist()
            assert lost == [[False] * 2, [column % n < low, column % n >= low], [False] * 2]


def test_silu_mul_hadamard_quantize_blocks_take_any_view(sm90: emulation.Emulated) -> None:
    x = torch.randn(6, 3, 160).bfloat16()
    for view in (x.transpose(0, 1), x[:2, :, ::2], x.flatten()[1:161], x[:, :0], x[:, :, 2:158]):
        low = (view.shape[-1] // 2 - 1) // 16 * 16
        run(sm90, view, True, view.shape[-1] // 2 - low, hadamard_block=16)


def test_silu_mul_hadamard_quantize_silu_has_the_cpus_bits(sm90: emulation.Emulated) -> None:
    """The scale of a row with one product shows every bit of silu(gate) * up, over the range of
    gates. Eight silus share a test of their gates: alone, a gate is beside seven zeros, which are
    divided by other instructions than the gates of most rows."""
    gates = torch.cat([torch.randn(3000) * 30, torch.linspace(-90, 90, 1000)])
    limits = torch.tensor([2.0**-96, 83.0])
    limits = torch.cat([limits, torch.nextafter(limits, limits * 2), limits.nextafter(limits / 2)])
    special = [-3e38, -1e4, -89.0, -87.5, -87.0, -1e-30, 0.0, -0.0, 1e-30, 88.8, 1e4, 3e38, 1e-42]
    gates = torch.cat([gates, limits, -limits, torch.tensor(special)])
    gates = torch.cat([gates, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    gate_up = torch.stack([gates, torch.ones_like(gates)], dim=-1)
    run(sm90, gate_up, False, 0, symmetric=True)
    run(sm90, gate_up, True, 0)
    beside = torch.stack([torch.ones(len(gates), 8), torch.zeros(len(gates), 8)], dim=1)
    row = torch.arange(len(gates))
    beside[row, 0, row % 8], beside[row, 1, row % 8] = gates, 1.0
    run(sm90, beside.flatten(1), False, 0, symmetric=True)


def test_silu_mul_hadamard_quantize_outliers_do_not_overflow(sm90: emulation.Emulated) -> None:
    for n in (344, 1232, 4864):
        gate_up = inputs(n, torch.bfloat16, rows=3)
        gate_up[0, 3], gate_up[0, n + 3] = 3e4, 3e4
        gate_up[1, 5], gate_up[1, n + 5] = 1e18, 1e18
        actual = run(sm90, gate_up, True)
        assert actual.params.isfinite().all()
        assert_quantizes(actual, *exact_rows(gate_up, True))


def test_silu_mul_hadamard_quantize_agrees_with_the_reference(sm90: emulation.Emulated) -> None:
    """Codes differ only where float32 roundings decide a tie: at most one in a thousand."""
    for n in (344, 4864):
        gate_up = inputs(n, torch.bfloat16, rows=4)
        actual = run(sm90, gate_up)
        expected = reference.silu_mul_hadamard_quantize(gate_up)
        torch.testing.assert_close(actual.params, expected.params, rtol=3e-6, atol=0)
        difference = (actual.q_lo.int() - expected.q_lo.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3


def test_silu_mul_hadamard_quantize_check_rejects_wrong_results(sm90: emulation.Emulated) -> None:
    gate_up = inputs(344, torch.float32, rows=4)
    exact, bound = exact_rows(gate_up, True)
    good = run(sm90, gate_up, True, 40)
    assert_quantizes(good, exact, bound)
    one_off = good.q_lo.clone()
    one_off[2, 100] += 1 if one_off[2, 100] < 0 else -1
    scale = good.params.clone()
    scale[1, 2] *= 1.01
    no_hadamard = run(sm90, gate_up, False, 40)
    for bad in (good._replace(q_lo=one_off), no_hadamard, good._replace(params=scale)):
        with pytest.raises(AssertionError):
            assert_quantizes(bad, exact, bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_silu_mul_hadamard_quantize_not_finite(sm90: emulation.Emulated, value: float) -> None:
    for n in (64, 72):
        for column in (0, n - 2, n, 2 * n - 1):
            gate_up = torch.randn(3, 2 * n)
            gate_up[1, column] = value
            actual = run(sm90, gate_up, True, 8)
            assert actual.params[:, 0].isnan().tolist() == [False, True, False]
            assert actual.params[:, 2].isnan().tolist() == [False, True, False]
            assert not actual.q_lo[1].any() and not actual.q_hi[1].any()


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (48,), (2, 3, 1, 48)])
def test_silu_mul_hadamard_quantize_batch_shapes(
    device: emulation.Emulated, shape: tuple[int, ...]
) -> None:
    actual = run(device, torch.randn(shape), True, 4)
    assert actual.q_lo.shape == (*shape[:-1], 20)


def test_silu_mul_hadamard_quantize_takes_any_strides(sm90: emulation.Emulated) -> None:
    x = torch.randn(48, 3, 96)
    for view in (x.transpose(0, 1)[:2], x[:2, :, ::2], x[0, 0].expand(3, 96), x.flatten()[1:97]):
        run(sm90, view, True, 4)
        run(sm90, view, False, 4)


def test_silu_mul_hadamard_quantize_errors(sm90: emulation.Emulated) -> None:
    with pytest.raises(RuntimeError, match="silu_mul_hadamard_quantize: gate_up: expected an even"):
        sm90.silu_mul_hadamard_quantize(torch.zeros(2, 9))
    with pytest.raises(RuntimeError, match="gate_up: expected rows that fit the shared memory"):
        sm90.silu_mul_hadamard_quantize(torch.zeros(1, 131072))
