"""Timing on a GPU: CUDA graphs of calls over rotating data, and the device's peaks, measured.

A candidate is captured as one CUDA graph of many calls, each with another copy of its data, so that
neither launch overhead nor a warm L2 cache distorts its time. Times come from CUDA events around a
replay.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from resq_kernels.bench.timing import Timing

# Bytes of other data between two uses of the same copy: four times the L2 of an H100.
COLD_BYTES = 200 * 2**20
CALLS_A_GRAPH = 32
MOST_COPIES = CALLS_A_GRAPH  # a replay uses each copy once, and the L2 is flushed before it


def alternate(
    candidates: Mapping[str, Callable[[int], object]], rounds: int = 9, calls: int = CALLS_A_GRAPH
) -> dict[str, Timing]:
    """Times every candidate in turn, round after round.

    Args:
        candidates: name -> call; its argument counts calls, to choose the copy of the data.
        rounds: how often each candidate has its turn.
        calls: calls in a graph.

    Raises:
        ValueError: there is nothing to time.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"alternate: expected candidates and rounds >= 1, got {rounds} rounds")
    graphs = {name: capture(call, calls) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    for graph in graphs.values():
        graph.replay()
    for turn in range(rounds):
        for name, graph in graphs.items():
            flush.fill_(turn)  # evicts what the last replay of this graph left in the L2
            samples[name].append(event_seconds(graph.replay) / calls)
    return {
        name: Timing(
            median_us=statistics.median(times) * 1e6,
            best_us=min(times) * 1e6,
            calls=len(times) * calls,
        )
        for name, times in samples.items()
    }


def alone(call: Callable[[int], object], seconds: float, rounds: int) -> Timing:
    """Times a call without others in turn, in about `seconds`.

    A call that takes long has fewer calls in its graph, and then fewer rounds.

    Args:
        call: its argument counts calls, to choose the copy of the data.
        seconds: of all rounds together; a round that is longer by itself runs once.
        rounds: at most this many.
    """
    call(0)
    once = max(event_seconds(lambda: call(1)), 1e-7)
    calls = min(max(int(seconds / rounds / once), 1), CALLS_A_GRAPH)
    graph = capture(call, calls)
    graph.replay()
    flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    samples = []
    for turn in range(min(max(int(seconds / (calls * once)), 1), rounds)):
        flush.fill_(turn)
        samples.append(event_seconds(graph.replay) / calls)
    return Timing(
        median_us=statistics.median(samples) * 1e6,
        best_us=min(samples) * 1e6,
        calls=len(samples) * calls,
    )


def event_seconds(run: Callable[[], object]) -> float:
    """Seconds between events before and after `run` on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, after one call that loads modules and allocates workspaces."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for index in range(calls):
            call(index)
    return graph


def captured(call: Callable[[int], Any]) -> Callable[[int], Any]:
    """`call(0)` as a graph: replaying it returns the same result, always in the same tensors."""
    results: list[Any] = []
    graph = capture(lambda index: results.append(call(index)), 1)
    result = results[-1]  # of the captured call

    def replay(index: int) -> Any:
        graph.replay()
        return result

    return replay


def device() -> dict[str, object]:
    """What times depend on: GPU, driver, clocks, power, versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "kernels": torch.ops.resq.cuda_family(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **state(),
    }


def state() -> dict[str, str]:
    """The driver, and at present clocks, power, temperature, reasons for throttling (0: none)."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit")
    # The name of this field depends on the driver, and one unknown name makes the whole query fail.
    reasons = _query("clocks_event_reasons.active") or _query("clocks_throttle_reasons.active")
    return _query(*fields, "temperature.gpu") | reasons


def _query(*fields: str) -> dict[str, str]:
    """Field -> value from nvidia-smi; empty if it is missing or does not know a field."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in result.stdout.split(",")]
    known = result.returncode == 0 and len(values) == len(fields)
    return dict(zip(fields, values, strict=True)) if known else {}


def clock() -> float:
    """Wall-clock seconds, read once the device has finished everything launched before."""
    torch.cuda.synchronize()
    return time.perf_counter()


def read_bandwidth(megabytes: int = 2048, repeats: int = 10) -> float:
    """Bytes per second read by the sum of a large tensor, or moved by a copy if that is more."""
    data = torch.ones(megabytes * 2**20 // 4, device="cuda")
    seconds = [event_seconds(data.sum) for _ in range(repeats)]
    return max(data.numel() * data.element_size() / min(seconds[1:]), copy_bandwidth())


def copy_bandwidth(megabytes: int = 2048, repeats: int = 10) -> float:
    """Bytes per second, read plus written, of a copy of a large tensor: the best of `repeats`."""
    source = torch.randint(0, 255, (megabytes * 2**20,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [event_seconds(lambda: target.copy_(source)) for _ in range(repeats)]
    return 2 * source.numel() / min(seconds[1:])


def int8_rate(library: Path, steps: int = 4000, repeats: int = 5) -> float | None:
    """Operations per second of 8-bit wgmma alone (benchmarks/cuda/int8_ceiling.cu, built as
    `library`).

    None if the device is not sm_90, or there is no such library.
    """
    if torch.cuda.get_device_capability() != (9, 0) or not library.exists():
        return None
    launch = ctypes.CDLL(str(library)).int8_ceiling_launch
    launch.restype = ctypes.c_double
    codes = torch.randint(0, 256, (16384,), dtype=torch.uint8, device="cuda")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(blocks * 256, dtype=torch.int32, device="cuda")
    operations = 0.0

    def run() -> None:
        nonlocal operations
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, out)]
        operations = launch(*pointers, blocks, steps, stream)
        if operations < 0:
            raise RuntimeError(f"int8_ceiling: expected a launch, got CUDA error {-operations}")

    seconds = [event_seconds(run) for _ in range(repeats)]
    return operations / min(seconds[1:])
