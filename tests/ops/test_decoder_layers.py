"""decoder_layers: the bits of the operators that it is made of, and what it refuses unwritten."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decoder_cases import VARIANTS, Case
from kv_cases import DTYPES

from resq_kernels import ops
from resq_kernels.ops.decoder_layers import LAYER_WEIGHTS

# Of a layer's weights: o_proj's packed weight and scale, gate_up's sums, the key rotation.
ROTATION, O_PACKED, O_SCALE, GATE_UP_SUM = 5, 6, 7, 13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_operators_one_by_one(dtype: torch.dtype) -> None:
    Case([5, 0, 70], [1, 9, 2], dtype).check()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_reaches_its_operator(name: str) -> None:
    Case([40, 3], [1, 1], torch.bfloat16, **VARIANTS[name]).check()


@pytest.mark.parametrize("lengths", [[1], [150, 40]], ids=str)
def test_layers_that_share_pages(lengths: list[int]) -> None:
    Case([0 for _ in lengths], lengths, torch.bfloat16).check_shared_pages()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_whatever_the_team(threads: int) -> None:
    """Steps of few rows, a prompt, a long context: operators on one thread and on all of them."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(4):  # threads come sooner or later
            Case([5, 0, 70], [1, 1, 1], torch.bfloat16).check()
            Case([0, 9], [130, 3], torch.float32).check()
        Case([2100], [1], torch.float16).check()
    finally:
        torch.set_num_threads(before)


def test_no_token_writes_nothing() -> None:
    case = Case([], [])
    arguments = case.arguments()
    out, residual = ops.decoder_layers(**arguments)
    assert out.shape == residual.shape == (0, case.hidden)
    assert all(map(torch.equal, arguments["caches"], case.caches))


def replaced(items: list[Any], at: int, value: Any) -> list[Any]:
    return [*items[:at], value, *items[at + 1 :]]


LAST = 2 * LAYER_WEIGHTS  # of three layers: what is wrong there must stop the first one too
# what is wrong -> (arguments of a call that replace a case's, the error)
WRONG: dict[str, tuple[Any, str]] = {
    "no layer": (lambda c: {"caches": [], "weights": []}, "caches: expected one for every layer"),
    "weights": (
        lambda c: {"weights": c.weights[:-1]},
        "weights: expected 19 for each of 3 layers, got 56",
    ),
    "n_hi": (lambda c: {"n_hi": [16, 32]}, "n_hi, clip: expected 3 each"),
    "n_hi too large": (lambda c: {"n_hi": [16, 32, 161]}, "n_hi: expected 0 to 160"),
    "n_hi of attention": (
        lambda c: {"n_hi": [16, 30, 0]},
        "n_hi: expected columns of attention that 4 heads share, got 30",
    ),
    "clip": (lambda c: {"clip": [1.0, 1.0, 0.0]}, "clip: expected a factor in (0, 1], got 0"),
    "lo_bits": (lambda c: {"lo_bits": 5}, "lo_bits: expected 4 or 8, got 5"),
    "x": (lambda c: {"x": c.x[None]}, "x: expected float32 or float16 or bfloat16 [*, *]"),
    "cos": (lambda c: {"cos": c.cos[1:]}, "cos: expected float32 or float16 or bfloat16 [2, *]"),
    "sin": (
        lambda c: {"sin": c.sin[:, 1:]},
        "sin: expected float32 or float16 or bfloat16 [2, 64]",
    ),
    "a cache": (
        lambda c: {"caches": [*c.caches[:2], c.caches[2][1:]]},
        "caches: expected uint8 [",
    ),
    "slots": (lambda c: {"slot_mapping": c.slots[:1]}, "slot_mapping: expected int64 [2]"),
    "table": (lambda c: {"block_table": c.table.long()}, "block_table: expected int32"),
    "lengths": (lambda c: {"seq_lens": c.lens[:1]}, "seq_lens: expected int32 [2]"),
    "starts": (lambda c: {"query_starts": c.starts[:2]}, "query_starts: expected int32 [3]"),
    "hi_bits": (lambda c: {"hi_bits": 5}, "hi_bits: expected 4 or 8, got 5"),
    "block": (
        lambda c: {"hadamard_block": 64},
        "hadamard_block: expected a divisor of the 160 low columns, got 64",
    ),
    "no o_proj": (
        lambda c: {"weights": replaced(c.weights, LAST + O_PACKED, None)},
        f"weights[{LAST + O_PACKED}]: expected a tensor, got None",
    ),
    "o_proj of another width": (
        lambda c: {"weights": replaced(c.weights, LAST + O_PACKED, c.weights[LAST + 1])},
        f"weights[{LAST + O_PACKED}]: expected uint8 [",
    ),
    "rows of o_proj": (
        lambda c: {"weights": replaced(c.weights, LAST + O_SCALE, torch.ones(95, 2))},
        f"weights[{LAST + O_SCALE}]: expected float32 [96, 2]",
    ),
    "sums": (
        lambda c: {"weights": replaced(c.weights, LAST + GATE_UP_SUM, c.lens)},
        f"weights[{LAST + GATE_UP_SUM}]: expected int32 [320, 2]",
    ),
    "gain": (
        lambda c: {"weights": replaced(c.weights, LAST, torch.ones(95))},
        f"weights[{LAST}]: expected float32 or float16 or bfloat16 [96]",
    ),
    "rotation": (
        lambda c: {"weights": replaced(c.weights, LAST + ROTATION, torch.ones(3, 64, 64))},
        f"weights[{LAST + ROTATION}]: expected float32 or float16 or bfloat16 [2, 64, 64]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_before_anything_is_written(what: str) -> None:
    case = Case([40, 3], [1, 1])
    change, words = WRONG[what]
    arguments = case.arguments() | change(case)
    before = [cache.clone() for cache in arguments["caches"]]
    with pytest.raises(RuntimeError, match="^decoder_layers: " + re.escape(words)):
        ops.decoder_layers(**arguments)
    assert all(map(torch.equal, arguments["caches"], before))


def test_a_width_without_a_transform_is_named_before_anything_is_written() -> None:
    case = Case([40, 3], [1, 1], intermediate=376)
    arguments = case.arguments()
    with pytest.raises(RuntimeError, match=r"^decoder_layers: weights: expected rows of 2\^a \* m"):
        ops.decoder_layers(**arguments)
    assert all(map(torch.equal, arguments["caches"], case.caches))
    Case([40, 3], [1, 1], intermediate=376, n_hi=[16, 32, 56], hadamard_block=64).check()


def test_a_slot_outside_of_the_cache_stops_the_first_layer() -> None:
    case = Case([40, 3], [1, 1])
    arguments = case.arguments() | {"slot_mapping": torch.tensor([0, 1 << 20])}
    with pytest.raises(RuntimeError, match="^kv_append: slot_mapping"):
        ops.decoder_layers(**arguments)
    assert all(map(torch.equal, arguments["caches"], case.caches))


def test_opcheck() -> None:
    case = Case([40, 3], [1, 1])
    torch.library.opcheck(torch.ops.resq.decoder_layers.default, (), case.arguments())


def test_compiled_as_one_graph() -> None:
    case = Case([40, 3], [1, 1])
    arguments = case.arguments()
    out, residual = torch.compile(ops.decoder_layers, fullgraph=True)(**arguments)
    expected, sums, caches = case.one_by_one()
    assert torch.equal(out, expected) and torch.equal(residual, sums)
    assert all(map(torch.equal, arguments["caches"], caches))
