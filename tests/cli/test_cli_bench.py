"""`resq bench`: documented keys, results that are checked first, and usage errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Result

from resq_kernels import ops
from resq_kernels.testing import bench_kv_attention, bench_mixed_gemm

ROW_KEYS = {
    "op",
    "model",
    "layer",
    "shape",
    "k_hi",
    "ours_us",
    "ours_best_us",
    "baseline",
    "baseline_us",
    "baseline_best_us",
    "ratio",
    "bytes_floor_us",
    "products_floor_us",
    "ceiling_share",
    "checked",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small layer in place of the real ones, and a limit that needs no compiler."""
    monkeypatch.setattr(bench_mixed_gemm, "SHAPES", {"square": [("square", 64, 256, 32)]})
    monkeypatch.setattr(bench_mixed_gemm, "integer_rate", lambda threads: 1e11)
    monkeypatch.setattr(bench_mixed_gemm.timing, "read_bandwidth", lambda clock: 1e10)


@pytest.mark.usefixtures("small")
def test_bench_writes_the_documented_keys(tmp_path: Path, resq: Callable[..., Result]) -> None:
    target = tmp_path / "bench.json"
    options = ("--batch", "1,3", "--rounds", 1, "--cold-mb", 0, "--json", target)
    result = resq("bench", "gemm", *options)
    assert result.code == 0, result.err
    figures = json.loads(target.read_text())
    assert set(figures) == {"machine", "limits", "rows"}
    assert len(figures["rows"]) == 2 * 3  # batches x baselines
    for row in figures["rows"]:
        assert set(row) == ROW_KEYS
        assert row["checked"] is True
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["ours_us"], abs=0.02, rel=0.1)
        m, n, k = row["shape"]
        floor = max((n * 224 // 2 + n * 32 + 16 * n + m * (k + 16 + 2 * n)) / 1e4, m * n * k / 1e5)
        assert max(row["bytes_floor_us"], row["products_floor_us"]) == round(floor, 1)


@pytest.mark.usefixtures("small")
def test_bench_refuses_a_kernel_that_is_wrong(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.mixed_gemm

    def wrong(*args: object) -> object:
        y = right(*args)
        y.view(-1)[5] *= 1.01
        return y

    monkeypatch.setattr(bench_mixed_gemm.ops, "mixed_gemm", wrong)
    result = resq("bench", "--batch", 1, "--rounds", 1)
    assert result.code == 1
    assert result.sentence == "mixed_gemm: square 1x64x256: differs from the reference"


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("conv",), 2, "invalid choice: 'conv'"),
        (("--shapes", "llama-9"), 2, "expected one of square, llama-3.2-1b"),
        (("--batch", "1,x"), 2, "at least 1, got 'x'"),
        (("--rounds", "0"), 2, "at least 1, got '0'"),
        (("--cpu-time", "--threads", "2"), 1, "add --threads 1"),
        (("attention", "--shapes", "square"), 1, "bench attention: --shapes: expected one of"),
        (("attention", "--context", "0"), 2, "at least 1, got '0'"),
    ],
)
def test_bench_refuses_wrong_options(
    resq: Callable[..., Result], options: tuple[str, ...], code: int, sentence: str
) -> None:
    result = resq("bench", *options)
    assert (result.code, sentence in result.sentence) == (code, True), result.err


ATTENTION_KEYS = ROW_KEYS - {"layer", "k_hi", "products_floor_us"}


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kv_attention, "HEADS", {"llama-3-8b": (4, 2, 64)})
    monkeypatch.setattr(bench_kv_attention.timing, "read_bandwidth", lambda clock: 1e10)


ATTENTION = ("bench", "attention", "--batch", "1,2", "--context", "70", "--rounds", 1)


@pytest.mark.usefixtures("small_heads")
def test_bench_attention_writes_the_documented_keys(
    tmp_path: Path, resq: Callable[..., Result]
) -> None:
    target = tmp_path / "bench.json"
    result = resq(*ATTENTION, "--cold-mb", 0, "--json", target)
    assert result.code == 0, result.err
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 2 * 4  # sequences x baselines
    for row in rows:
        assert set(row) == ATTENTION_KEYS
        assert row["checked"] is True
        assert row["bytes_floor_us"] == round(row["shape"][0] * 70 * 2 * 88 / 1e4, 1)


@pytest.mark.usefixtures("small_heads")
def test_bench_attention_refuses_a_kernel_that_is_wrong(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.kv_attention
    monkeypatch.setattr(
        bench_kv_attention.ops, "kv_attention", lambda *args: right(*args[:5], args[5] * 1.02)
    )
    result = resq(*ATTENTION)
    assert result.code == 1
    assert result.sentence == "kv_attention: llama-3-8b 1x70: differs from the reference"
