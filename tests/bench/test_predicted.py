"""benchmarks/predicted: times from the SASS, of kernels that exist, and what is made from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREDICTED = ROOT / "benchmarks/predicted"
KEYS = {"kernel", "shape", "chip", "cycles", "us", "before_cycles", "target_us"}
KEYS |= {"commit", "command"}
MHZ = {"H200": 1755}


def test_rows() -> None:
    """`commit` is the one whose library has the addresses of `command`."""
    table = json.loads((ROOT / "tests/cuda/kernel_table.json").read_text())
    rows = json.loads((PREDICTED / "decode.json").read_text())
    assert rows and len({(row["kernel"], row["shape"], row["chip"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == KEYS
        clock = MHZ[row["chip"]]
        assert row["us"] == pytest.approx(row["cycles"] / clock, abs=0.006)
        assert 0 < row["cycles"] < row["before_cycles"]
        assert any(name.startswith(f"{row['kernel']}_kernel") for name in table), row["kernel"]
        assert f"'{row['kernel']}_kernel" in row["command"] and f"--clock {clock}" in row["command"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_times_of_kv_attention_are_what_the_script_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No cell is faster than a copy of its pages, and none is slower than it was."""
    script = load_script("kv_attention_times")
    script.main(["--json", str(tmp_path / "rows.json")])
    committed = PREDICTED / "kv_attention.json"
    assert (tmp_path / "rows.json").read_text() == committed.read_text()
    rows = json.loads(committed.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == len(script.TARGETS)
    for row in rows:
        assert row["copy_us"] < row["us"] < row["before_us"]


@pytest.fixture(scope="module")
def weights_in_l2() -> ModuleType:
    return load_script("weights_in_l2")


def test_weights_in_l2_are_what_the_script_predicts(
    weights_in_l2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_in_l2.main(["--json", str(tmp_path / "rows.json")])
    committed = PREDICTED / "weights_in_l2.json"
    assert (tmp_path / "rows.json").read_text() == committed.read_text()
    rows = json.loads(committed.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for first in range(0, len(rows), 4):  # each way brings no less than the one before it
        layers = [row["layer_us"] for row in rows[first : first + 4]]
        assert layers == sorted(layers, reverse=True)
        for row in rows[first : first + 4]:
            assert (row["prefetch"] == "none") == (set(row["waiting_mb"].values()) == {0.0})


def test_a_product_is_never_faster_than_l2_or_slower_than_memory(
    weights_in_l2: ModuleType,
) -> None:
    for model, products in weights_in_l2.LAYERS.items():
        for l2 in weights_in_l2.L2.values():
            for way in weights_in_l2.WAYS:
                row = weights_in_l2.predict(model, way, l2)
                for product in products:
                    us, size = row["product_us"][product.name], product.megabytes
                    assert size / l2 - 0.01 <= us <= size / weights_in_l2.MEMORY + 0.01
                    assert row["waiting_mb"][product.name] <= product.asked(None) + 0.05
