"""Forced choices: every legal one has the same bits, every other one is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import emulation
import pytest
import torch
from gemm_cases import assert_exact, forced, make_case
from test_cuda_kv_attention import make

HERE = Path(__file__).parent


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("packed", [True, False], ids=["nibbles", "unpacked"])
def test_every_legal_choice_has_the_bits_of_the_reference(
    rows: int, packed: bool, device: emulation.Emulated
) -> None:
    """N that ends inside every tile, K that ends inside every K tile, fewer steps than warps."""
    weight = (140, 200, 40)
    names = device.mixed_gemm_choices(rows, *weight, packed, device.index)
    case = make_case(rows, weight, packed, torch.float16, torch.float16)
    for name in names:
        with forced(device, "mixed_gemm", name):
            assert device.mixed_gemm_kernel(rows, *weight, packed, device.index) == name
            assert_exact(case, device)
    # 6 steps of small_m; K tiles of low codes and one of high ones: sm80 2 or 4, sm90 2.
    family = {80: 2 * (3 if packed else 5), 90: 3 * 3 + 1}[device.arch]
    assert len(names) == 4 * 6 + family


@pytest.mark.parametrize(
    "choice",
    ["fast", "sm90", "sm90 64x128", "sm90 48x128 splits=1", "sm90 64x128 splits=5",
     "sm90 192x128 splits=2",
     "small_m 8x64 splits=0", "small_m 8x64 splits=17", "small_m 8x64 splits=1 "],
)  # fmt: skip
def test_other_choices_are_refused(choice: str, sm90: emulation.Emulated) -> None:
    case = make_case(5, (64, 2048, 512))
    expected = (
        "mixed_gemm: force_kernel: expected small_m 8x64 splits=1..16, "
        r".*, sm90 192x128 splits=1 \(5 rows x 64 x \(2048 \| 512\) columns on sm90\), "
        f"got {re.escape(choice)}$"
    )
    with forced(sm90, "mixed_gemm", choice):
        for call in (
            lambda: case.run(sm90),
            lambda: sm90.mixed_gemm_kernel(5, 64, 2048, 512, True, sm90.index),
        ):
            with pytest.raises(RuntimeError, match=expected):
                call()


def test_a_kernel_of_another_family_is_refused(device: emulation.Emulated) -> None:
    other = {80: "sm90 64x128 splits=1", 90: "sm80 64x128 splits=1"}[device.arch]
    with (
        forced(device, "mixed_gemm", other),
        pytest.raises(RuntimeError, match=f"expected small_m .* on sm{device.arch}.*got {other}"),
    ):
        make_case(5, (64, 128, 32)).run(device)


def test_only_operators_with_choices_can_be_forced(sm90: emulation.Emulated) -> None:
    message = "force_kernel: op: expected mixed_gemm or kv_attention, got hadamard"
    with pytest.raises(RuntimeError, match=message):
        sm90.force_kernel("hadamard", "fast")


def test_a_choice_is_forced_in_one_thread(sm90: emulation.Emulated) -> None:
    """The benchmark's thread does not change what a server's threads run."""
    arguments, found = (5, 64, 2048, 512, True, sm90.index), []
    ordinary = sm90.mixed_gemm_kernel(*arguments)
    with forced(sm90, "mixed_gemm", "sm90 192x128 splits=1"):
        thread = threading.Thread(target=lambda: found.append(sm90.mixed_gemm_kernel(*arguments)))
        thread.start()
        thread.join()
        with forced(sm90, "mixed_gemm", "small_m 64x64 splits=3"):
            assert sm90.mixed_gemm_kernel(*arguments) == "small_m 64x64 splits=3"
        assert sm90.mixed_gemm_kernel(*arguments) == "sm90 192x128 splits=1"
    assert found == [ordinary] == [sm90.mixed_gemm_kernel(*arguments)]


def test_kv_attention_has_the_same_bits_with_any_splits(device: emulation.Emulated) -> None:
    # Of these the last two do not fit into half of the workspace.
    case = make([2100, 40, 1100, 1500, 1030], [2, 1, 9, 9, 1], 128, n_kv=2)
    ordinary = case.run(device)
    for choice in ("splits=1", "splits=some", "splits=whole"):
        with forced(device, "kv_attention", choice):
            assert torch.equal(case.run(device), ordinary), choice
    expected = "expected splits=1, splits=some or splits=whole, got splits=2"
    message = f"kv_attention: force_kernel: {expected}"
    with (
        forced(device, "kv_attention", "splits=2"),
        pytest.raises(RuntimeError, match=message),
    ):
        case.run(device)


PROGRAM = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent / "ops")!r}]
import conftest, emulation
from gemm_cases import assert_exact, make_case
from test_cuda_kv_attention import make
conftest.library()
device = emulation.Emulated(90)
make([1100], [1], 64).run(device)
assert_exact(make_case(5, (64, 128, 32)), device)
"""


def run_with(**variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RESQ_LOG_KERNELS": "1", **variables}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_variables_force_the_process_and_the_log_says_so(sm90: emulation.Emulated) -> None:
    gemm, attention = "sm90 64x128 splits=1", "splits=whole"
    run = run_with(RESQ_MIXED_GEMM=gemm, RESQ_KV_ATTENTION=attention)
    assert run.returncode == 0, run.stderr
    assert f"resq_kernels: mixed_gemm: cuda sm90, {gemm} (forced)\n" in run.stderr
    assert f"resq_kernels: kv_attention: cuda sm90, {attention} (forced)\n" in run.stderr


def test_variables_that_name_nothing_are_refused(sm90: emulation.Emulated) -> None:
    run = run_with(RESQ_MIXED_GEMM="sm80 64x128 splits=1")
    assert "mixed_gemm: RESQ_MIXED_GEMM: expected small_m 8x64 splits=1..4, " in run.stderr
    assert run.stderr.rstrip().endswith("got sm80 64x128 splits=1")
    assert "kv_attention: cuda sm90, splits=1\n" in run.stderr
    run = run_with(RESQ_KV_ATTENTION="whole")
    expected = "expected splits=1, splits=some or splits=whole, got whole"
    message = f"kv_attention: RESQ_KV_ATTENTION: {expected}"
    assert run.stderr.rstrip().endswith(message)
