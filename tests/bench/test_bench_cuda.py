"""The CUDA path of the benchmarks without a GPU: fake CUDA tensors find wrong devices, shapes and
dtypes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from resq_kernels.bench import (
    attention,
    cuda_timing,
    cutlass_s4s8,
    device,
    gemm,
    gemm_baselines,
    hadamard,
    models,
    prefill,
    quantize,
)
from resq_kernels.bench.device import BenchDevice
from resq_kernels.bench.timing import Timing

MODEL = "qwen2.5-0.5b"
MODULES = [gemm, hadamard, quantize, attention, prefill]


class FakeCutlass:
    """cutlass_s4s8.CutlassS4S8 for tensors without data."""

    def workspace(self, m: int, n: int, k: int, device: torch.device) -> torch.Tensor:
        return torch.empty(m, dtype=torch.uint8, device=device)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        assert all(tensor.device.type == "cuda" for tensor in tensors)
        weight, x, weight_scale, row_scale, out, _ = tensors
        assert weight.shape == (len(weight_scale), x.shape[1] // 2)
        assert out.shape == (len(row_scale), len(weight)) and len(x) == len(row_scale)
        return out


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Fake CUDA tensors, results taken for right, every candidate called; name -> its devices."""
    called: dict[str, set[str]] = {}

    def alternate(bench: BenchDevice, candidates: Any, *, eager: bool = False) -> Any:
        for name, call in candidates.items():
            results = [leaf for i in range(2) for leaf in tree_leaves(call(i))]
            tensors = [leaf for leaf in results if isinstance(leaf, torch.Tensor)]
            called.setdefault(name, set()).update(tensor.device.type for tensor in tensors)
        return dict.fromkeys(candidates, Timing(median_us=2.0, best_us=1.0, calls=1))

    monkeypatch.setattr(BenchDevice, "alternate", alternate)
    monkeypatch.setattr(BenchDevice, "attempt", lambda _, call: call(0))
    monkeypatch.setattr(gemm, "differing", lambda *_: [])
    for module in (hadamard, quantize):
        monkeypatch.setattr(module, "agrees", lambda *_: True)
        # Its matrices come from a cache of real tensors.
        monkeypatch.setattr(module, "kron_transform", lambda *_: lambda x: x)
    monkeypatch.setattr(attention, "check", lambda *_: True)
    monkeypatch.setattr(prefill, "agrees", lambda *_: True)
    for module in (prefill, prefill.prefill):
        # It asks the device for its kernels; where results go does not depend on the mask.
        monkeypatch.setattr(module, "causal_lower_right", lambda *_: None)
    monkeypatch.setattr(torch.ops.resq, "cuda_family", lambda _: "sm90", raising=False)
    monkeypatch.setattr(torch.ops.resq, "mixed_gemm_kernel", lambda *_: "sm90", raising=False)
    monkeypatch.setattr(cutlass_s4s8, "load", FakeCutlass)
    monkeypatch.setattr(cutlass_s4s8, "check", lambda *_: None)
    monkeypatch.setattr(cuda_timing, "read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(cuda_timing, "copy_bandwidth", lambda: 2e12)
    monkeypatch.setattr(cuda_timing, "int8_rate", lambda _: 1e15)
    return called


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_every_candidate_stays_on_the_gpu(
    module: ModuleType, fake_cuda: dict[str, set[str]]
) -> None:
    bench = BenchDevice(device="cuda", cold_bytes=cuda_timing.COLD_BYTES)
    args = SimpleNamespace(shapes=[MODEL], batch=[1, 32], context=[70], table_width=[1, 2])
    missing: dict[str, str] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = list(module.rows(bench, args, missing))
    assert not bench.failures
    assert fake_cuda and all(devices == {"cuda"} for devices in fake_cuda.values()), fake_cuda
    assert {row["kernel"] for row in rows} == {"sm90"}
    assert {row["baseline"] for row in rows} == set(fake_cuda) - {"ours"}
    if module is gemm:
        names = {"F.linear bf16", "F.linear fp16", "torch._scaled_mm fp8", "torch._int_mm"}
        assert set(fake_cuda) == names | {"ours", "torch int4 g128", "CUTLASS s4 x s8"}
        assert missing["torch._int_mm"] == "takes more than 16 rows, got 1"
        first = rows[0]
        assert first["compute_bound_us"] == round(1152 * 896 / 0.5e15 * 1e6, 2)
        assert first["ceiling_share"] == pytest.approx(first["memory_bound_us"] / 2.0, abs=5e-3)
    else:
        assert all(row["compute_bound_us"] is None for row in rows)


def test_an_alternative_that_cannot_run_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices\nat some line")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    monkeypatch.setattr(cutlass_s4s8, "LIBRARY", Path("nowhere/cutlass_s4s8.so"))
    monkeypatch.setattr(BenchDevice, "attempt", lambda _, call: call(0))
    missing: dict[str, str] = {}
    bench = BenchDevice(device="cuda", cold_bytes=0)
    with FakeTensorMode():
        found = gemm_baselines.baselines(bench, 32, 256, 256, missing)
    assert "torch._scaled_mm fp8" not in found and len(found) == 4
    assert missing == {
        "torch._scaled_mm fp8": "torch._scaled_mm is only supported on newer devices",
        "CUTLASS s4 x s8": "expected benchmarks/cuda/cutlass_s4s8.so, found none "
        "(docs/cuda.md: how to build it)",
    }


@pytest.mark.parametrize("known", ["clocks_event_reasons", "clocks_throttle_reasons"])
def test_state_of_the_gpu_under_either_name(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"""#!/bin/sh
        case "$1" in
          --query-gpu={known}.active) echo 0x0000000000000004 ;;
          *reasons*) echo 'Field is not a valid field to query.'; exit 2 ;;
          *) echo '580.1, 1980 MHz, 2619 MHz, 310.5 W, 700.0 W, 41' ;;
        esac
        """
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cuda_timing.state() == {
        "driver_version": "580.1",
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "power.draw": "310.5 W",
        "power.limit": "700.0 W",
        "temperature.gpu": "41",
        f"{known}.active": "0x0000000000000004",
    }
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda_timing.state() == {}


def test_a_rate_that_cannot_be_measured_is_none_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> float:
        raise subprocess.CalledProcessError(1, ["nvcc"])

    monkeypatch.setattr(cuda_timing, "int8_rate", fails)
    assert BenchDevice(device="cuda").products_per_second is None
    assert "the rate of integer products is not measured: " in capsys.readouterr().err


def test_copies_pass_the_cold_bytes_but_no_more_than_a_graph_reaches() -> None:
    tensor = torch.zeros(1000, dtype=torch.uint8)
    assert len(BenchDevice(cold_bytes=0).copies(tensor)) == 1
    copies = BenchDevice(cold_bytes=5500).copies(tensor)
    assert len(copies) == 6 and len({copy.data_ptr() for copy in copies}) == 6
    assert len(BenchDevice(device="cuda", cold_bytes=10**6).copies(tensor)) == 32


def test_models_have_the_sizes_of_their_configurations() -> None:
    # (N, K) of the products as in arXiv 2407.21783 and the Qwen2.5 report, and tests/gpu.
    assert [layer[1:3] for layer in models.layers("llama-3-70b")] == [
        (10240, 8192),
        (8192, 8192),
        (57344, 8192),
        (8192, 28672),
    ]
    assert models.layers("qwen2.5-72b")[3] == ("down", 8192, 29568, 3712)
    assert models.layers("qwen2.5-7b")[0] == ("qkv", 4608, 3584, 448)
    assert models.heads("llama-3.2-1b") == (32, 8, 64)
    assert models.configuration("llama-3-8b", 2)["num_hidden_layers"] == 2
    for name in models.names():
        assert len(models.layers(name)) == 4


def test_kron_transform_is_the_transform() -> None:
    for width in (192, 896, 4864):
        x = torch.randn(3, width)
        y = hadamard.kron_transform(width)(x)
        assert torch.allclose(y, hadamard.hadamard.transform(x), atol=1e-4)


def test_nbytes_counts_nested_tensors_and_nothing_else() -> None:
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert device.nbytes(x, (x, [x, None]), "name") == 3 * 30
