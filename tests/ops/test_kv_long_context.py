"""kv_attention over 128k tokens: at most 1 % of the error that the cache itself makes."""

from __future__ import annotations

import pytest
import torch
from kv_cases import HEAD_DIMS
from kv_long_context import FLAT, USUAL, error_share

from resq_kernels import ops


@pytest.mark.slow
@pytest.mark.parametrize("scale", [FLAT, USUAL], ids=["flat", "usual"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_128k_tokens(head_dim: int, scale: float | None) -> None:
    assert error_share(ops.kv_attention, head_dim, scale) <= 0.01


def test_the_gate_rejects_a_part_in_a_hundred_thousand() -> None:
    def biased(*arguments: object) -> torch.Tensor:
        return ops.kv_attention(*arguments) * (1 + 2.0**-16)

    assert error_share(biased, 128, FLAT) > 0.01
