"""Blocks of a weight's columns, for the tests of gptq_block on every device."""

from __future__ import annotations

import torch


def arguments(columns: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Targets, weight, feedback and scale; codes of 4 bits are clamped now and then."""
    weight = torch.randn(columns, rows)
    targets = weight + 0.1 * torch.randn(columns, rows)
    feedback = torch.randn(columns, columns) / max(columns, 1) ** 0.5
    return targets, weight, feedback, 0.1 + 0.3 * torch.rand(rows)
