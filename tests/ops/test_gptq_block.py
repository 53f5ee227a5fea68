"""gptq_block: its sums against float64, everything else exactly, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from gptq_cases import arguments

from resq_kernels import ops, reference
from resq_kernels.ops.gptq_block import MAX_COLUMNS


def assert_right(
    found: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...], bits: int
) -> None:
    """Given the errors of earlier columns, a column's sum is right within its roundings; its code
    and error are those of the sum, exactly."""
    codes, errors, exact = found
    targets, weight, feedback, scale = given
    half, columns = 2 ** (bits - 1), len(targets)
    assert codes.dtype == torch.int8 and errors.dtype == exact.dtype == torch.float32
    assert codes.shape == errors.shape == exact.shape == targets.shape
    earlier = feedback.double().triu(1).T
    sums = targets.double() + earlier @ errors.double()
    # Two roundings of 2^-24 for each term, of what is added up until then, and one of the quotient.
    sizes = targets.double().abs() + earlier.abs() @ errors.double().abs()
    slack = (2 * torch.arange(columns)[:, None] + 2) * 2.0**-24 * sizes
    off = (exact.double() * scale.double() - sums).abs()
    assert (off <= slack).all()
    assert torch.equal(codes.float(), exact.clamp(-half, half - 1).round())
    assert torch.equal(errors, weight - codes.float() * scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 31, 32])
@pytest.mark.parametrize("rows", [1, 3, 8, 15, 33, 64, 1000])
def test_columns_make_up_for_those_before(rows: int, columns: int, bits: int) -> None:
    given = arguments(columns, rows)
    assert_right(ops.gptq_block(*given, bits), given, bits)


def test_the_tolerance_sees_a_term_that_is_left_out() -> None:
    """And a thousandth of it."""
    given = arguments(8, 100)
    found = ops.gptq_block(*given, 4)
    given[2][2, 5] += 1e-3
    with pytest.raises(AssertionError):
        assert_right(found, given, 4)


def test_only_feedback_to_later_columns_is_read() -> None:
    targets, weight, feedback, scale = arguments(20, 50)
    expected = ops.gptq_block(targets, weight, feedback, scale, 4)
    feedback.masked_fill_(torch.ones(20, 20).tril().bool(), torch.nan)
    assert all(map(torch.equal, ops.gptq_block(targets, weight, feedback, scale, 4), expected))


def test_the_whole_is_the_reference_s() -> None:
    """In rows that come near no edge between two codes, where one code changes all later ones."""
    given = arguments(32, 400)
    found, expected = ops.gptq_block(*given, 4), reference.gptq_block(*given, 4)
    apart = ((expected[2] - expected[2].floor()) - 0.5).abs()
    safe = (apart > 1e-4).all(0)
    assert safe.sum() > 350
    assert torch.equal(found[0][:, safe], expected[0][:, safe])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[:, safe], theirs[:, safe], rtol=1e-5, atol=1e-5)


def test_half_way_goes_to_the_even_code_and_the_ends_clamp() -> None:
    targets = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 1e30, -1e30, torch.inf, -8.5]])
    scale, one = torch.ones(10), torch.zeros(1, 1)
    codes, errors, exact = ops.gptq_block(targets, targets, one, scale, 4)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8, 7, -8]]
    assert torch.equal(exact, targets) and torch.equal(errors, targets - codes)
    codes = ops.gptq_block(targets * 16, targets, one, scale, 8)[0]
    assert codes.tolist() == [[8, 24, 40, -8, -24, 120, 127, -128, 127, -128]]


def test_nan_stays_in_its_row() -> None:
    targets, weight, feedback, scale = arguments(5, 9)
    expected = ops.gptq_block(targets, weight, feedback, scale, 4)
    targets[1, 3] = torch.nan
    codes, errors, exact = ops.gptq_block(targets, weight, feedback, scale, 4)
    assert codes[1, 3] == -8 and exact[1, 3].isnan() and errors.isfinite().all()
    others = torch.arange(9) != 3
    for found, right in zip((codes, errors, exact), expected, strict=True):
        assert torch.equal(found[:, others], right[:, others])


def test_views() -> None:
    targets, weight, feedback, scale = arguments(12, 40)
    views = (targets.T.contiguous().T, weight[:, ::2], feedback.T, scale[::2])
    views = (views[0][:, 1::2], *views[1:])
    copies = [view.contiguous() for view in views]
    found, expected = ops.gptq_block(*views, 4), ops.gptq_block(*copies, 4)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nothing_to_round(shape: tuple[int, int]) -> None:
    given = arguments(*shape)
    assert all(part.shape == shape for part in ops.gptq_block(*given, 8))


def test_threads_change_nothing() -> None:
    given = arguments(32, 5000)
    together = ops.gptq_block(*given, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, ops.gptq_block(*given, 4), together))
    finally:
        torch.set_num_threads(threads)


GOOD = (torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, 3), torch.ones(8))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.zeros(3, 8).half(), "targets: expected float32 \\[\\*, \\*\\]"),
        (0, torch.zeros(8), "targets: expected float32 \\[\\*, \\*\\]"),
        (0, torch.zeros(MAX_COLUMNS + 1, 8), "targets: expected at most 32 columns of the weight"),
        (1, torch.zeros(3, 7), "weight: expected float32 \\[3, 8\\]"),
        (1, torch.zeros(3, 8).double(), "weight: expected float32 \\[3, 8\\]"),
        (2, torch.zeros(3, 4), "feedback: expected float32 \\[3, 3\\]"),
        (3, torch.ones(8, 1), "scale: expected float32 \\[8\\]"),
        (4, 5, "bits: expected 4 or 8, got 5"),
        (0, torch.zeros(3, 8, requires_grad=True), "targets: expected a tensor that needs no grad"),
    ],
)
def test_what_is_refused(at: int, value: object, words: str) -> None:
    given = [*GOOD, 4]
    given[at] = value
    with pytest.raises(RuntimeError, match=f"gptq_block: {words}"):
        ops.gptq_block(*given)


def test_opcheck() -> None:
    op = torch.ops.resq.gptq_block.default
    for columns, rows in ((5, 33), (32, 1), (0, 4)):
        torch.library.opcheck(op, (*arguments(columns, rows), 4))
