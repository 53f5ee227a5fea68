"""Benchmarks of models and layers as on a GPU, but on a CPU, with plain calls instead of graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_kernels.bench import cuda_timing, graphs, models
from resq_kernels.bench import layer as bench_layer
from resq_kernels.bench import model as bench_model
from resq_kernels.bench.device import BenchDevice
from resq_kernels.bench.timing import Timing
from resq_kernels.testing.quantized_models import random_quantized

MODEL = "llama-3.2-1b"
BASELINES = {"transformers bf16", "transformers bf16 graph", "ours eager"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A device that says it is a GPU; name of a candidate -> its last result, of two calls each."""
    results: dict[str, torch.Tensor] = {}

    def alternate(bench: BenchDevice, candidates: Any, *, eager: bool = False) -> Any:
        for name, call in candidates.items():
            first, results[name] = call(0), call(1)
            assert torch.equal(first, results[name]), name
        return dict.fromkeys(candidates, Timing(median_us=2.0, best_us=1.0, calls=1))

    sizes = ("llama", 256, 192, 2, 4, 2, 320, False)
    monkeypatch.setitem(models.SIZES, MODEL, sizes)
    monkeypatch.setattr(BenchDevice, "on_gpu", property(lambda _: True))
    monkeypatch.setattr(BenchDevice, "alternate", alternate)
    monkeypatch.setattr(BenchDevice, "attempt", lambda _, call: call(0))
    monkeypatch.setattr(cuda_timing, "captured", lambda call: call)
    monkeypatch.setattr(torch.ops.resq, "cuda_family", lambda _: "sm90", raising=False)
    monkeypatch.setattr(cuda_timing, "read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(cuda_timing, "int8_rate", lambda _: 1e15)
    return results


def rows(
    module: Any, missing: dict[str, str], failures: list[str] | None = None
) -> list[dict[str, Any]]:
    args = SimpleNamespace(shapes=[MODEL], batch=[2], context=[64], layers=2)
    bench = BenchDevice(cold_bytes=2**20)
    found = list(module.rows(bench, args, missing))
    if failures is None:
        assert not bench.failures
    else:
        failures += bench.failures
    return found


def test_a_model_is_timed_as_graphs_and_as_python_calls_it(gpu: dict[str, torch.Tensor]) -> None:
    missing: dict[str, str] = {}
    found = rows(bench_model, missing)
    assert not missing
    for kind in ("prefill", "decode"):
        places = [row for row in found if row["op"] == f"model_{kind}"]
        assert {row["baseline"] for row in places} == BASELINES
        for row in places:
            same = row["baseline"] == "ours eager"
            assert (row["baseline_bytes"] == row["ours_bytes"]) == same
    assert torch.equal(gpu["ours"], gpu["ours eager"])
    one, grown = gpu["transformers bf16 graph"], gpu["transformers bf16"]
    assert (one - grown).norm() <= 1e-2 * grown.norm()


def test_a_graph_with_another_result_is_not_timed(
    gpu: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(call: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        return lambda i: call(i) * 1.05

    monkeypatch.setattr(cuda_timing, "captured", wrong)
    for module, sentence in (
        (bench_model, "differs from the eager call by 0.05 of the norm"),
        (bench_layer, "prefill 2x64: ours: as a graph it differs by 0.05"),
    ):
        failures: list[str] = []
        assert not rows(module, {}, failures)
        assert sentence in failures[0]
    assert not gpu


def test_a_baseline_that_cannot_be_captured_is_missing() -> None:
    def refused() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls = {"ours": lambda i: torch.ones(1, 1, 4), "other": lambda i: torch.ones(1, 1, 4)}
    captured = {"ours": lambda: calls["ours"], "other": refused}
    missing: dict[str, str] = {}
    found = graphs.added(calls, captured, 1e-2, missing)
    assert list(found) == ["ours", "ours eager", "other"]
    assert missing == {"other graph": "operation not permitted when stream is capturing"}
    with pytest.raises(RuntimeError, match="operation not permitted"):
        graphs.added(calls, {"ours": refused}, 1e-2, {})


def test_a_layer_has_a_compiled_baseline(
    gpu: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    missing: dict[str, str] = {}
    found = rows(bench_layer, missing)
    assert not missing
    assert {row["baseline"] for row in found} == {"transformers bf16", "torch.compile bf16"}


def test_copies_of_a_layer_are_cold_and_stay_fused() -> None:
    model = random_quantized("llama")
    bench, layer = BenchDevice(cold_bytes=2**18), model.model.layers[0]
    layers = [other for other, _ in bench_layer.copies(bench, layer, None)]
    assert len(layers) >= 3
    states = [list(layer.state_dict().values()) for layer in layers]
    assert all(torch.equal(*pair) for pair in zip(*states[:2], strict=True))
    weights = {layer.mlp.down_proj.packed_weight.data_ptr() for layer in layers}
    assert len(weights) == len(layers)
    for layer in layers:
        assert layer.self_attn.fused is not None and layer.mlp.fused is not None


def test_one_step_writes_the_last_place_every_time() -> None:
    keys, values = torch.randn(2, 1, 2, 5, 8)
    layer = graphs.one_step_cache([(keys, values)]).layers[0]
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(1) == (6, 0)
    for _ in range(2):
        new = torch.randn(2, 1, 2, 1, 8)
        got = layer.update(*new)
        for whole, old, last in zip(got, (keys, values), new, strict=True):
            assert torch.equal(whole, torch.cat([old, last], dim=2))
