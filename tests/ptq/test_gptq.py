"""GPTQ against its definition in float64, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from resq_kernels.formats import unpack_int4
from resq_kernels.ops import search_scale
from resq_kernels.ptq.gptq import feedback_factor, gptq
from resq_kernels.ptq.quantize import output_error
from resq_kernels.weights import quantize_weight

DAMPING = 0.01


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the hessian of correlated inputs in ascending order of variance."""
    x = torch.randn(2 * columns, columns, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + x
    x = x * torch.linspace(0.2, 3.0, columns, dtype=torch.float64)
    return torch.randn(rows, columns), x.T @ x / len(x)


def by_elimination(
    weight: torch.Tensor, hessian: torch.Tensor, k_hi: int, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and what they were rounded from, by the definition: round a column, move the best
    correction of all later columns.

    After column j is fixed, the later columns minimise ||(w - q) M (w - q)^T|| exactly: they gain
    e_j M_jr M_rr^-1 with r the later columns. No factorization, no blocks, float64.
    """
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    work, columns = weight.double().clone(), weight.shape[1]
    codes = torch.empty_like(work)
    for j in range(columns):
        part, half = (0, 8) if j < columns - k_hi else (1, 128)
        codes[:, j] = torch.round(work[:, j] / scale[:, part]).clamp(-half, half - 1)
        error = work[:, j] - codes[:, j] * scale[:, part]
        rest = slice(j + 1, columns)
        if j + 1 < columns:
            gain = torch.linalg.solve(damped[rest, rest], damped[rest, j])
            work[:, rest] += error[:, None] * gain
    return codes, work


@pytest.mark.parametrize(("rows", "columns", "k_hi"), [(5, 40, 8), (3, 16, 0), (4, 150, 20)])
def test_gptq_is_elimination(rows: int, columns: int, k_hi: int) -> None:
    weight, hessian = problem(rows, columns)
    rounded, targets = gptq(weight, hessian, k_hi, DAMPING)
    k_lo = columns - k_hi
    parts = (weight[:, :k_lo], 4), (weight[:, k_lo:], 8)
    scale = torch.stack([search_scale(part, bits) for part, bits in parts], dim=1)
    assert torch.equal(rounded.weight_scale, scale)
    codes = torch.cat([unpack_int4(rounded.weight_lo), rounded.weight_hi], dim=1)
    expected, exact = by_elimination(weight, hessian, k_hi, scale)
    # float32 may decide a tie differently, and what follows in that row with it.
    same = (codes == expected).all(1)
    assert same.float().mean() >= 0.6
    exact = exact[:, k_lo:] / scale[:, 1:]
    torch.testing.assert_close(targets[same].double(), exact[same], rtol=0, atol=1e-3)
    assert torch.equal(targets.round().clamp(-128, 127).to(torch.int8), rounded.weight_hi)
    a, b = (
        output_error(
            weight, c * scale.repeat_interleave(torch.tensor([k_lo, k_hi]), dim=1), hessian
        )
        for c in (codes, expected)
    )
    assert a == pytest.approx(b, rel=0.03)


def by_columns(
    weight: torch.Tensor, hessian: torch.Tensor, k_hi: int, scale: torch.Tensor
) -> torch.Tensor:
    """Codes by the algorithm of arXiv 2210.17323, float64, a column at a time.

    With C the upper Cholesky factor of the damped inverse, column j's error (w_j - q_j) / C_jj is
    subtracted from all later columns, times C_jk.
    """
    eye = torch.eye(len(hessian)).double()
    inverse = torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * eye)
    factor = torch.linalg.cholesky(inverse, upper=True)
    work, columns = weight.double().clone(), weight.shape[1]
    codes = torch.empty_like(work)
    for j in range(columns):
        part, half = (0, 8) if j < columns - k_hi else (1, 128)
        codes[:, j] = torch.round(work[:, j] / scale[:, part]).clamp(-half, half - 1)
        error = (work[:, j] - codes[:, j] * scale[:, part]) / factor[j, j]
        work[:, j:] -= error[:, None] * factor[j, j:]
    return codes


def test_gptq_is_the_paper_s() -> None:
    """Without its inverse, and rounded in blocks: the codes are the same but for ties."""
    weight, hessian = problem(200, 150)
    rounded, _ = gptq(weight, hessian, 20, DAMPING)
    codes = torch.cat([unpack_int4(rounded.weight_lo), rounded.weight_hi], dim=1)
    expected = by_columns(weight, hessian, 20, rounded.weight_scale)
    assert (codes == expected).all(1).float().mean() >= 0.95
    wrong = by_columns(
        weight, hessian * 1.01 - 0.01 * hessian.diag().diag(), 20, rounded.weight_scale
    )
    assert (codes == wrong).all(1).float().mean() < 0.5


def test_rows_are_rounded_on_their_own() -> None:
    """So q, k, v are rounded as one matrix."""
    weight, hessian = problem(90, 70)
    whole = gptq(weight, hessian, 10, DAMPING)[0].split([50, 40])
    for rounded, rows in zip(whole, weight.split([50, 40]), strict=True):
        alone, _ = gptq(rows, hessian, 10, DAMPING)
        assert torch.equal(rounded.weight_scale, alone.weight_scale)
        same = (rounded.weight_lo == alone.weight_lo).all(1)
        same &= (rounded.weight_hi == alone.weight_hi).all(1)
        assert same.float().mean() >= 0.9  # sums of other shapes, other ties


def test_gptq_beats_rounding_to_nearest() -> None:
    weight, hessian = problem(32, 96)
    errors = [
        output_error(weight, rounded.dequantize(), hessian)
        for rounded in (gptq(weight, hessian, 12, DAMPING)[0], quantize_weight(weight, 12))
    ]
    assert errors[0] < 0.85 * errors[1]


def test_uncorrelated_inputs_make_gptq_quantize_weight() -> None:
    weight = torch.randn(7, 64)
    hessian = torch.eye(64, dtype=torch.float64)
    rounded, nearest = gptq(weight, hessian, 8, DAMPING)[0], quantize_weight(weight, 8)
    assert torch.equal(rounded.weight_lo, nearest.weight_lo)
    assert torch.equal(rounded.weight_hi, nearest.weight_hi)


def test_inputs_that_are_always_zero() -> None:
    weight, hessian = problem(4, 24)
    hessian[5], hessian[:, 5] = 0, 0
    rounded, _ = gptq(weight, hessian, 4, DAMPING)
    assert torch.isfinite(rounded.dequantize()).all()
    factor = feedback_factor(torch.zeros(3, 3, dtype=torch.float64), DAMPING)
    assert torch.equal(factor, torch.eye(3))


def test_too_little_damping_is_named() -> None:
    hessian = torch.ones(4, 4, dtype=torch.float64) - 1e-6 * torch.eye(4).double()
    with pytest.raises(ValueError, match="gptq: damping: expected enough to .*, got 1e-09"):
        feedback_factor(hessian, 1e-9)
    assert torch.isfinite(feedback_factor(hessian, DAMPING)).all()


def test_codes_fill_their_ranges() -> None:
    weight, hessian = problem(64, 128)
    rounded, _ = gptq(weight, hessian, 16, DAMPING)
    assert unpack_int4(rounded.weight_lo).unique().tolist() == list(range(-8, 8))
    assert rounded.weight_hi.short().abs().max() > 64
    tensors = rounded.named("a.b")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "a.b.weight_lo": (torch.uint8, (64, 56)),
        "a.b.weight_hi": (torch.int8, (64, 16)),
        "a.b.weight_scale": (torch.float32, (64, 2)),
    }


def test_output_error_is_measured_on_the_inputs() -> None:
    x = torch.randn(500, 20, dtype=torch.float64)
    x = (x * torch.logspace(-3, 1, 20)) @ torch.linalg.qr(torch.randn(20, 20).double()).Q
    weight, other = torch.randn(6, 20), torch.randn(6, 20)
    got = output_error(weight, other, x.T @ x / 500)
    expected = (x @ (weight - other).double().T).norm() / (x @ weight.double().T).norm()
    assert got == pytest.approx(float(expected), rel=1e-5)
    assert got * 1.0001 != pytest.approx(float(expected), rel=1e-5)
    assert output_error(torch.zeros(2, 20), torch.zeros(2, 20), x.T @ x) == 0.0
