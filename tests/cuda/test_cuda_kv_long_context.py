"""kv_attention on CUDA over 128k tokens: at most 1 % of the error that the cache itself makes."""

from __future__ import annotations

import emulation
import pytest
from kv_cases import HEAD_DIMS
from kv_long_context import FLAT, USUAL, error_share


@pytest.mark.parametrize("scale", [FLAT, USUAL], ids=["flat", "usual"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_128k_tokens(device: emulation.Emulated, head_dim: int, scale: float | None) -> None:
    assert error_share(device.kv_attention, head_dim, scale) <= 0.01
