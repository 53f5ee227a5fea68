"""benchmarks/predicted: times from the SASS, of kernels that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"kernel", "shape", "chip", "cycles", "us", "before_cycles", "target_us"}
KEYS |= {"commit", "command"}
MHZ = {"H200": 1755}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/predicted").glob("*.json")), ids=str)
def test_rows(path: Path) -> None:
    """`commit` is the one whose library has the addresses of `command`."""
    table = json.loads((ROOT / "tests/cuda/kernel_table.json").read_text())
    rows = json.loads(path.read_text())
    assert rows and len({(row["kernel"], row["shape"], row["chip"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == KEYS
        clock = MHZ[row["chip"]]
        assert row["us"] == pytest.approx(row["cycles"] / clock, abs=0.006)
        assert 0 < row["cycles"] < row["before_cycles"]
        assert any(name.startswith(f"{row['kernel']}_kernel") for name in table), row["kernel"]
        assert f"'{row['kernel']}_kernel" in row["command"] and f"--clock {clock}" in row["command"]
