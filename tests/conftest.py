"""The order of the files: `make test` gives each to one of a few processes, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# Up to two minutes, most of them in one test: begun last, one would keep a process busy when there
# is nothing left for the others.
LONG = (
    "cuda/test_cutlass_s4s8.py",
    "cuda/test_kernel_table.py",
    "gpu_run/test_dry_cuda.py",
    "examples/test_demo_small.py",
    "test_import.py",
    "ptq/test_out_folder.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first, the longest before the others."""
    ranks = {TESTS / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG)))
