"""The dry device: devices that are kept apart, captures that are repeated, the run on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVICES = """
import copy
import pytest
import torch
from torch import nn

x, y = torch.randn(3, 5, device="cuda"), torch.randn(3, 5)
assert x.is_cuda and x.device == torch.device("cuda", 0) and not y.is_cuda
assert y.cuda().is_cuda and not x.cpu().is_cuda and torch.tensor([1, 2], device="cuda").is_cuda
with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
    x + y
assert torch.equal((x + y.cuda()).cpu(), x.cpu() + y)
assert torch.equal((x * torch.tensor(2.0)).cpu(), x.cpu() * 2)  # a scalar of the CPU
x[1].add_(1)  # a view shares memory; a copy does not
assert torch.equal(x.cpu()[1], x[1].cpu())
there = y.cuda()
there.zero_()
assert y.abs().sum() > 0

layer = nn.Linear(5, 4)
expected = layer(y)
layer.cuda()
assert layer.weight.is_cuda and torch.equal(layer(y.cuda()).cpu(), expected)
other = copy.deepcopy(layer)
assert isinstance(other.weight, nn.Parameter) and other.weight.is_cuda
other.weight.data.zero_()
assert layer.weight.abs().sum() > 0

codes = torch.ops.resq.mixed_quantize(torch.randn(3, 64, device="cuda"), 8, 4, True, False, 1.0)
assert all(part.is_cuda for part in codes)
"""
CAPTURES = """
import pytest
import torch

x, kept = torch.randn(4, 64, device="cuda"), torch.zeros(4, 64, device="cuda")

def step():
    y = x * 2
    kept.add_(y)
    return torch.ops.resq.hadamard(y[1:], 1.0)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = step()
for _ in range(3):
    x.copy_(torch.randn(4, 64, device="cuda"))
    before = kept.clone()
    graph.replay()
    assert torch.equal(result, torch.ops.resq.hadamard(x[1:] * 2, 1.0))
    assert torch.equal(kept, before + x * 2)
for read in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero()):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [DEVICES, CAPTURES], ids=["devices", "captures"])
def test_the_dry_device_is_one(program: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    command = [sys.executable, str(ROOT / "tools/gpu/dry_cuda.py"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_some_steps_of_the_run_on_it(tmp_path: Path) -> None:
    """All of them: `python tools/gpu_check.py --dry --out DIR`, some minutes."""
    steps = ("info", "first-mixed_gemm", "latency", "capture", "replays", "profile")
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *steps], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {step["name"]: step["status"] for step in report["steps"]} == dict.fromkeys(
        steps, "passed"
    )
    rows = report["steps"][2]["figures"]["rows"]
    assert {row["op"] for row in rows} >= {"mixed_quantize", "kv_append", "kv_attention"}
