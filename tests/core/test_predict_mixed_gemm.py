"""tools/predict_mixed_gemm.py: the committed table is what it says, and cells by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks/predicted/mixed_gemm.json"
LIMITS = {"latency", "waves", "memory", "L2", "shared memory", "tensor cores"}


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("predict_mixed_gemm")


def test_the_committed_table_is_what_the_script_predicts(
    predict: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main(["--json", str(tmp_path / "rows.json"), "--cells", "h200", "llama-3-8b"])
    assert (tmp_path / "rows.json").read_text() == COMMITTED.read_text(), (
        "run python tools/predict_mixed_gemm.py --json benchmarks/predicted/mixed_gemm.json"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    rows = json.loads(COMMITTED.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(predict.CHIPS) + 4 * len(predict.ROWS)
    cells = {(r["chip"], r["model"], r["layer"], r["m"]) for r in rows}
    models = len(predict.CHIPS) * len(predict.MODELS)
    assert len(cells) == len(rows) == models * 4 * len(predict.ROWS)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["bf16_us"] / row["us"], abs=0.006)
        assert row["limit"] in LIMITS
        assert (row["target"] is not None) == (row["chip"] == "h200")
        assert (row["fp8_us"] is None) == (row["chip"] == "a100")
    assert {row["limit"] for row in rows} == LIMITS


def test_cells_by_hand(predict: ModuleType) -> None:
    """Clocks of tests/core/test_core_cuda_choice.py::test_times_by_hand over the clock rate."""
    rows = {
        (r["layer"], r["m"]): r
        for r in json.loads(COMMITTED.read_text())
        if (r["chip"], r["model"]) == ("h200", "llama-3-8b")
    }
    row = rows["down", 64]
    load = (128 * (12544 / 2 + 1792) + 32 * 14336) / 28 / 4
    finish = 160 + 1800 + 64 * 128 * 4 * 3 / 4 / 32
    assert row["choice"] == "sm90 64x128 splits=4"
    assert row["us"] == pytest.approx((1500 + load + finish) / 1700 + 0.6, abs=0.006)
    assert row["bf16_us"] == pytest.approx(2 * 4096 * 14336 / 4.3e6 + 1.5, abs=0.006)  # reading
    row = rows["qkv", 8192]
    flops = 2 * 8192 * 6144 * 4096
    assert row["bf16_us"] == pytest.approx(flops / (989e6 * 0.75) + 1.5, abs=0.006)
    assert row["fp8_us"] == pytest.approx(flops / (1979e6 * 0.75) + 1.5, abs=0.006)
    waves = -(-43 * 24 // 66)  # of tiles of 192 rows, in clusters of two along N
    clocks = 1500 + waves * (6 * 4096 + 1920)
    assert row["us"] == pytest.approx(clocks / 1400 + 0.6, abs=0.006)  # products for long: power


@pytest.mark.parametrize(
    ("m", "megabytes", "expected"),
    [(1, 60, 3.2), (16, 59.9, 2.3), (16, 8, 2.3), (1, 7.9, 1.0), (17, 60, 2.9), (64, 1, 2.9),
     (128, 1, 2.3), (256, 1, 1.6), (512, 1, 1.0), (2048, 1, 1.75), (16384, 1, 1.75)],
)  # fmt: skip
def test_targets(m: int, megabytes: float, expected: float, predict: ModuleType) -> None:
    assert predict.target(m, megabytes) == expected
