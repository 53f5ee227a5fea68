"""decode_step: the bits of decoder_layers and the sum, step after step, and what it refuses."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from typing import Any

import pytest
import torch
from decoder_cases import VARIANTS, Case
from kv_cases import DTYPES, cos_sin

from resq_kernels import ops

STEPS = 3


class Steps:
    """A case whose pages have room for `STEPS` tokens more, and tables of RoPE.

    Args:
        lengths: tokens of each sequence before the first step.
        dtype, kinds: as in `Case`.
    """

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32, **kinds: Any):
        self.lengths, rows = lengths, len(lengths)
        # The pages of as many tokens as there will be; the call itself is made of what follows.
        self.case = Case(lengths, rows * [STEPS], dtype, **kinds)
        # Tables are of consecutive positions here, of which cos_sin makes no promise.
        self.cos, self.sin = cos_sin(max([0, *lengths]) + STEPS, self.case.head_dim)
        self.caches = [cache.clone() for cache in self.case.caches]

    def arguments(self) -> dict[str, Any]:
        own = self.case.arguments()
        for name in ("slot_mapping", "seq_lens", "query_starts"):
            del own[name]
        x = self.case.x[: len(self.lengths)]
        return own | {"x": x, "cos": self.cos, "sin": self.sin, "caches": self.caches}

    def expected(self, x: torch.Tensor, lens: torch.Tensor, caches: list[torch.Tensor]) -> Any:
        """By decoder_layers, which writes `caches`."""
        case, page = self.case, 32
        pages = case.table.long().gather(1, (lens // page)[:, None])[:, 0]
        arguments = case.arguments() | {
            "x": x,
            "cos": self.cos[lens],
            "sin": self.sin[lens],
            "caches": caches,
            "slot_mapping": pages * page + lens % page,
            "seq_lens": lens.int() + 1,
            "query_starts": torch.arange(len(lens) + 1, dtype=torch.int32),
        }
        out, residual = ops.decoder_layers(**arguments)
        return out + residual

    def check(self) -> None:
        step = ops.prepare_decode_step(**self.arguments())
        lens = torch.tensor(self.lengths, dtype=torch.int32)
        caches = [cache.clone() for cache in self.case.caches]
        for i in range(STEPS):
            x = torch.randn(len(lens), self.case.hidden).to(self.case.dtype)
            right = self.expected(x, lens.long(), caches)
            found = ops.decode_step(step, x, lens)
            assert torch.isfinite(right).all()
            assert found.dtype == right.dtype
            assert torch.equal(found, right)
            assert all(map(torch.equal, self.caches, caches))
            assert lens.tolist() == [length + i + 1 for length in self.lengths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_decoder_layers(dtype: torch.dtype) -> None:
    Steps([5, 0, 70], dtype).check()
    Steps([31], dtype).check()  # the second token begins a page
    Steps([2100], dtype).check()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_reaches_its_operator(name: str) -> None:
    Steps([40, 3], torch.bfloat16, **VARIANTS[name]).check()


def test_a_length_may_be_set_back() -> None:
    """Steps depend on nothing but x, the lengths and the pages."""
    steps = Steps([40, 3])
    step = ops.prepare_decode_step(**steps.arguments())
    x, lens = steps.case.x[:2], torch.tensor([40, 3], dtype=torch.int32)
    first = ops.decode_step(step, x, lens)
    ops.decode_step(step, x, lens)
    lens -= 2
    assert torch.equal(ops.decode_step(step, x, lens), first)


def test_no_sequence() -> None:
    steps = Steps([])
    step = ops.prepare_decode_step(**steps.arguments())
    out = ops.decode_step(step, steps.case.x[:0], torch.zeros(0, dtype=torch.int32))
    assert out.shape == (0, steps.case.hidden)


def test_a_step_holds_its_tensors_until_it_is_deleted() -> None:
    steps = Steps([40, 3])
    arguments = steps.arguments()
    lens = torch.tensor([40, 3], dtype=torch.int32)
    right = steps.expected(arguments["x"], lens.long(), [c.clone() for c in steps.caches])
    arguments["weights"] = [None if w is None else w.clone() for w in arguments["weights"]]
    step = ops.prepare_decode_step(**arguments)
    x = arguments["x"]
    held = weakref.ref(arguments["weights"][1])
    del arguments
    gc.collect()
    assert held() is not None
    assert torch.equal(ops.decode_step(step, x, lens), right)
    del step
    gc.collect()
    assert held() is None


# what is wrong -> (arguments that replace the right ones, the error)
WRONG_PREPARED: dict[str, tuple[Any, str]] = {
    "x": (lambda a: {"x": a["x"][None]}, "prepare_decode_step: x: expected float32 or float16"),
    "cos": (
        lambda a: {"cos": a["cos"].half()},
        "prepare_decode_step: cos: expected float32 [*, *]",
    ),
    "sin": (lambda a: {"sin": a["sin"][1:]}, "prepare_decode_step: sin: expected float32 [43, 64]"),
    "table": (
        lambda a: {"block_table": a["block_table"][:1]},
        "prepare_decode_step: block_table: expected int32 [2, *]",
    ),
    "weights": (
        lambda a: {"weights": a["weights"][:-1]},
        "decoder_layers: weights: expected 19 for each of 3 layers, got 56",
    ),
    "no layer": (
        lambda a: {"caches": [], "weights": []},
        "decoder_layers: caches: expected one for every layer",
    ),
}


@pytest.mark.parametrize("what", WRONG_PREPARED)
def test_what_is_wrong_is_named_when_it_is_prepared(what: str) -> None:
    arguments = Steps([40, 3]).arguments()
    change, words = WRONG_PREPARED[what]
    with pytest.raises(RuntimeError, match="^" + re.escape(words)):
        ops.prepare_decode_step(**arguments | change(arguments))


WRONG: dict[str, tuple[Any, str]] = {
    "x": (lambda step, x, lens: (step, x[:1], lens), "x: expected float32 [2, 96]"),
    "another dtype": (lambda step, x, lens: (step, x.half(), lens), "x: expected float32 [2, 96]"),
    "lengths": (lambda step, x, lens: (step, x, lens.long()), "seq_lens: expected int32 [2]"),
    "a length too large": (
        lambda step, x, lens: (step, x, lens + 3),
        "seq_lens[0]: expected 0 to 42 (rows of cos, and the pages' columns, less 1), got 43",
    ),
    "a negative length": (
        lambda step, x, lens: (step, x, lens - 4),
        "seq_lens[1]: expected 0 to 42 (rows of cos, and the pages' columns, less 1), got -1",
    ),
    "a copy": (
        lambda step, x, lens: (step.clone(), x, lens),
        "step: expected what prepare_decode_step has returned, not a copy, got uint8 [1]",
    ),
    "a deep copy": (
        lambda step, x, lens: (copy.deepcopy(step), x, lens),
        "step: expected what prepare_decode_step has returned, not a copy, got uint8 [1]",
    ),
    "another tensor": (
        lambda step, x, lens: (x, x, lens),
        "step: expected what prepare_decode_step has returned, not a copy, got float32 [2, 96]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_before_anything_is_written(what: str) -> None:
    steps = Steps([40, 3])
    change, words = WRONG[what]
    step = ops.prepare_decode_step(**steps.arguments())
    lens = torch.tensor([40, 3], dtype=torch.int32)
    given = change(step, steps.case.x[:2], lens)
    before = given[2].clone()
    with pytest.raises(RuntimeError, match="^decode_step: " + re.escape(words)):
        ops.decode_step(*given)
    assert torch.equal(given[2], before)
    assert all(map(torch.equal, steps.caches, steps.case.caches))


def test_a_page_that_is_missing() -> None:
    steps = Steps([40, 3])
    arguments = steps.arguments()
    arguments["block_table"] = arguments["block_table"].clone()
    arguments["block_table"][1, 0] = -1
    step = ops.prepare_decode_step(**arguments)
    lens = torch.tensor([40, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="^decode_step: block_table: expected a page"):
        ops.decode_step(step, steps.case.x[:2], lens)
    assert all(map(torch.equal, steps.caches, steps.case.caches))
