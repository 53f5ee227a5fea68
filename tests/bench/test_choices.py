"""`resq bench gemm --choices` without a GPU: the CPU's kernel stands in for every choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_kernels.bench import choices, cuda_timing, gemm, models
from resq_kernels.bench.device import BenchDevice
from resq_kernels.bench.timing import Timing
from resq_kernels.cli import main
from resq_kernels.commands import loading

CHOICES = ["small_m 8x64 splits=1", "small_m 8x64 splits=2", "sm90 32x128 splits=1"]
TIMES = {CHOICES[0]: 12.0, CHOICES[1]: 10.0, CHOICES[2]: 40.0}
LAYERS = [("o", 64, 128, 16), ("down", 32, 96, 0)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU with three choices, of which the first is taken; `forced` is the one that runs."""
    state = SimpleNamespace(forced="", fails={}, synchronized=0)

    def force_kernel(op: str, choice: str) -> str:
        assert op == "mixed_gemm"
        before, state.forced = state.forced, choice
        return before

    def alone(call: Callable[[int], Any], seconds: float, rounds: int) -> Timing:
        assert seconds == choices.SECONDS and rounds == 3
        if state.forced in state.fails:
            raise RuntimeError(state.fails[state.forced])
        assert call(0).dtype == torch.bfloat16
        us = TIMES[state.forced]
        return Timing(median_us=us, best_us=us - 1, calls=96)

    def synchronize() -> None:
        state.synchronized += 1

    facts = {
        "force_kernel": force_kernel,
        "mixed_gemm_kernel": lambda *_: CHOICES[0],
        "mixed_gemm_choices": lambda *_: CHOICES,
        "cuda_device": lambda _: [9, 0, 132, 5120],
        "cuda_family": lambda _: "sm90",
    }
    for name, function in facts.items():
        monkeypatch.setattr(torch.ops.resq, name, function, raising=False)
    monkeypatch.setattr(cuda_timing, "alone", alone)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(BenchDevice, "read_bandwidth", 1e9)
    monkeypatch.setattr(models, "layers", lambda _: LAYERS)
    monkeypatch.delenv(choices.VARIABLE, raising=False)
    return state


ARGS = SimpleNamespace(shapes=["square"], batch=[1, 5])


def sweep() -> list[list[dict[str, Any]]]:
    """The batches; each with a choice that failed is a sentence too, in the same order."""
    bench = BenchDevice(rounds=3)
    batches = list(choices.sweep(bench, ARGS))
    wrong = [[row for row in batch if row["error"]] for batch in batches]
    assert bench.failures == [
        f"mixed_gemm: square {rows[0]['layer']} M = {rows[0]['m']}: {len(rows)} of 3 choices "
        f"failed, first {rows[0]['choice']}: {rows[0]['error']}"
        for rows in wrong
        if rows
    ]
    return batches


def test_every_choice_is_a_record(device: SimpleNamespace) -> None:
    batches = sweep()
    assert [(b[0]["layer"], b[0]["m"]) for b in batches] == [
        ("o", 1), ("o", 5), ("down", 1), ("down", 5)
    ]  # fmt: skip
    for batch in batches:
        assert [row["choice"] for row in batch] == CHOICES
        assert [row["chosen"] for row in batch] == [True, False, False]
        assert [row["us"] for row in batch] == list(TIMES.values())
        assert all(row["error"] is None and row["calls"] == 96 for row in batch)
    first = batches[1][0]
    assert (first["n"], first["k_lo"], first["k_hi"], first["packed"]) == (64, 112, 16, False)
    moved = 64 * (56 + 16 + 16) + 5 * (112 + 16 + 16 + 2 * 64)
    assert first["memory_bound_us"] == pytest.approx(moved / 1e3, rel=0.02)
    assert device.forced == "" and device.synchronized == 4
    cells = choices.cells(batches[0])
    assert cells[3:] == ["12.00", "10.00", "1.200", "0", CHOICES[0], CHOICES[1]]
    assert len(choices.line(cells)) == len(choices.line(choices.HEADER)) + len(CHOICES[1]) - 4


def test_a_choice_that_fails_is_recorded_and_the_sweep_goes_on(device: SimpleNamespace) -> None:
    device.fails = {CHOICES[1]: "CUDA out of memory. Tried\nto allocate"}
    for batch in sweep():
        assert [row["error"] for row in batch] == [None, "CUDA out of memory. Tried", None]
        assert batch[1]["us"] is None and batch[1]["calls"] == 0
        assert choices.cells(batch)[3:7] == ["12.00", "12.00", "1.000", "1"]
    device.fails = dict.fromkeys(CHOICES[:1], "no")
    assert choices.cells(sweep()[0])[3:] == ["", "10.00", "", "1", CHOICES[0], CHOICES[1]]
    device.fails = dict.fromkeys(CHOICES, "no")
    assert choices.cells(sweep()[0])[3:] == ["", "", "", "3", CHOICES[0], ""]


def test_a_choice_with_other_bits_is_not_timed(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = gemm.Layer.product

    def wrong(self: gemm.Layer, activation: Any, i: int) -> torch.Tensor:
        y = product(self, activation, i)
        if device.forced == CHOICES[2]:
            y.view(torch.int16)[-1, -1] ^= 1
        return y

    monkeypatch.setattr(gemm.Layer, "product", wrong)
    for batch in sweep():
        errors = [row["error"] for row in batch]
        assert errors == [None, None, "differs from the result of the dispatch's choice"]
        assert batch[2]["us"] is None


def test_a_wrong_choice_of_the_dispatch_costs_its_layer(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = gemm.Layer.product

    def wrong(self: gemm.Layer, activation: Any, i: int) -> torch.Tensor:
        return product(self, activation, i) * (2 if self.name == "o" else 1)

    monkeypatch.setattr(gemm.Layer, "product", wrong)
    bench = BenchDevice(rounds=3)
    batches = list(choices.sweep(bench, ARGS))
    assert bench.failures == ["mixed_gemm: square o 1x64x128: differs from the reference"]
    assert [batch[0]["layer"] for batch in batches] == ["down", "down"]


def test_a_lost_device_is_said_after_its_records(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    bench = BenchDevice(rounds=3)
    batches = list(choices.sweep(bench, ARGS))
    assert [len(batch) for batch in batches] == [3, 3]  # one of each layer
    assert bench.failures == ["CUDA error: an illegal memory access was encountered"] * 2


def test_the_program_writes_what_it_has_after_every_batch(
    device: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The run is stopped in its third batch: JSON and Markdown hold the first two."""
    monkeypatch.setattr(loading, "choose_device", lambda asked: asked or "cpu")
    monkeypatch.setattr(BenchDevice, "machine", lambda _: {"device": "cuda", "gpu": {"gpu": "X"}})
    complete = choices.sweep

    def on_the_cpu(bench: BenchDevice, args: Any) -> Any:
        for count, batch in enumerate(complete(BenchDevice(rounds=bench.rounds), args)):
            if count == 2:
                raise RuntimeError("stopped")
            yield batch

    monkeypatch.setattr(choices, "sweep", on_the_cpu)
    command = ["bench", "gemm", "--device", "cuda", "--choices", "all"]
    command += ["--batch", "1,5", "--rounds", "3", "--out"]
    assert main([*command, str(tmp_path / "sweep")]) == 1
    output = capsys.readouterr()
    assert "stopped" in output.err and "1.200" in output.out
    figures = json.loads((tmp_path / "sweep.json").read_text())
    assert figures["device"] == {
        "major": 9, "minor": 0, "multiprocessors": 132, "memory_bits": 5120, "family": "sm90"
    }  # fmt: skip
    assert len(figures["choices"]) == 2 * 3 and figures["rows"] == []
    assert {"command", "machine", "machine_after", "peaks", "missing"} <= set(figures)
    text = (tmp_path / "sweep.md").read_text()
    assert "| square | o | 5 | 12.00 | 10.00 | 1.200 | 0 | " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.md"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gemm --device cpu", "--choices times CUDA kernels: expected --device cuda, got cpu"),
        ("attention", "--choices: expected bench gemm without --compare, got bench attention"),
        ("gemm --compare a.json", "--compare, got bench gemm --compare"),
    ],
)
def test_choices_elsewhere_are_refused(
    command: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", *command.split(), "--choices", "all"]) != 0
    assert message in capsys.readouterr().err


def test_a_forced_process_is_refused(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choices.VARIABLE, CHOICES[0])
    with pytest.raises(ValueError, match="expected RESQ_MIXED_GEMM to be unset, got small_m 8x64"):
        sweep()


def test_a_slow_call_is_timed_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms a choice: 32 calls of 5 us seven times, but 3 ms three times and 40 ms once."""
    found = {}
    for us in (5.0, 300.0, 3000.0, 40000.0):
        graph = SimpleNamespace(calls=0, replays=0)

        def capture(_: Any, calls: int, graph: SimpleNamespace = graph) -> SimpleNamespace:
            graph.calls = calls
            return graph

        def replay(graph: SimpleNamespace = graph) -> None:
            graph.replays += 1

        def seconds(run: Any, us: float = us, graph: SimpleNamespace = graph) -> float:
            run()
            return us * (graph.calls or 1) / 1e6

        graph.replay = replay
        monkeypatch.setattr(cuda_timing, "capture", capture)
        monkeypatch.setattr(cuda_timing, "event_seconds", seconds)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1, dtype=torch.uint8))
        timing = cuda_timing.alone(lambda _: None, 0.01, 7)
        monkeypatch.undo()
        assert timing.median_us == pytest.approx(us)
        assert timing.calls == graph.calls * (graph.replays - 1)  # one replay warms up
        found[us] = (graph.calls, graph.replays - 1)
    assert found == {5.0: (32, 7), 300.0: (4, 7), 3000.0: (1, 3), 40000.0: (1, 1)}
