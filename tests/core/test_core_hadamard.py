"""csrc/core/hadamard.h and resq_kernels/hadamard.py construct the same matrices."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from resq_kernels import hadamard

# Intermediate sizes of Llama 2/3/3.1/3.2 and Qwen2.5.
MODEL_SIZES = [8192, 14336, 28672, 53248, 11008, 13824, 4864, 8960, 18944, 27648, 29568]


def factors(n: int) -> list[int]:
    """Python's factorization; empty where there is none."""
    try:
        return list(hadamard.factors(n))
    except ValueError:
        return []


def test_factorizations_agree(core: ModuleType) -> None:
    found = 0
    for n in range(1, 2001):
        expected = factors(n)
        assert core.hadamard_factors(n) == expected, n
        found += bool(expected)
    assert 200 < found < 1800  # both kinds of sizes are there
    assert core.hadamard_factors(0) == core.hadamard_factors(-12) == []


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_model_sizes_factor(core: ModuleType, shards: int) -> None:
    for n in MODEL_SIZES:
        expected = factors(n // shards)
        assert expected and core.hadamard_factors(n // shards) == expected, n


def test_paley_kinds_agree(core: ModuleType) -> None:
    for order in range(-8, hadamard.MAX_PALEY_ORDER + 9):
        expected = hadamard.paley_kind(order) if order > 2 else 0
        assert core.paley_kind(order) == expected, order


def test_matrices_agree(core: ModuleType) -> None:
    """Every Paley order that a size up to 2000, a model or a shard of one uses."""
    sizes = [*range(1, 2001), *(n // shards for n in MODEL_SIZES for shards in (1, 2, 4, 8))]
    orders = sorted({order for n in sizes for order in core.hadamard_factors(n)[:-1]})
    assert {12, 20, 28, 76, 84, 148, 344} <= set(orders) and len(orders) > 50
    for order in orders:
        actual = torch.from_numpy(core.paley_matrix(order)).long()
        assert torch.equal(actual, hadamard.paley(order)), order


@pytest.mark.parametrize("n", [4864, 11008, 18944, 29568, 13824])
def test_plan_holds_the_matrices(core: ModuleType, n: int) -> None:
    """The kernels' table offsets, read back as signs."""
    power, paley = core.hadamard_plan(n)
    assert (*(order for order, _, _ in paley), power) == hadamard.factors(n)
    for order, streams, offsets in paley:
        rows = order // streams
        assert streams == hadamard.paley_kind(order) and offsets.shape == (rows, (rows + 3) // 4)
        line, column = np.divmod(offsets, core.PALEY_TILE)
        table, entry = np.divmod(line, 16)
        held = core.PALEY_TABLES // streams
        assert (table == np.arange(offsets.shape[1]) % held * streams).all() and not column.any()
        signs = 1 - 2 * (entry[..., None] >> np.arange(4) & 1).reshape(rows, -1)
        assert (signs[:, rows:] == 1).all()
        s = torch.from_numpy(signs[:, :rows].astype(np.int64))
        if streams == 2:  # y_2i = (s (a + b))_i - 2 b_i, y_2i+1 = (s (a - b))_i - 2 a_i
            butterfly, swap = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[0, 1], [1, 0]])
            s = torch.kron(s, butterfly) - 2 * torch.kron(torch.eye(rows, dtype=torch.int64), swap)
        assert torch.equal(s, hadamard.paley(order))


def test_plan_refuses_other_sizes(core: ModuleType) -> None:
    for n in (0, 3, 92 * 47):
        with pytest.raises(ValueError, match="no plan"):
            core.hadamard_plan(n)
