"""Comparable timings on a CPU: candidates in turn, facts about the machine, measured bandwidths."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of single calls, in microseconds.

    Attributes:
        median_us: the figure to quote.
        best_us: the fastest call; if it is far below the median, the machine was busy.
        calls: how many were timed.
    """

    median_us: float
    best_us: float
    calls: int


def against(ours: Timing, baseline: str | None, theirs: Timing | None) -> dict[str, object]:
    """The times and the ratio of a row; above 1 ours is faster. None without a baseline."""
    row: dict[str, object] = {
        "ours_us": round(ours.median_us, 2),
        "ours_best_us": round(ours.best_us, 2),
        "baseline": baseline,
        "baseline_us": None,
        "baseline_best_us": None,
        "ratio": None,
    }
    if theirs is not None:
        row["baseline_us"] = round(theirs.median_us, 2)
        row["baseline_best_us"] = round(theirs.best_us, 2)
        row["ratio"] = round(theirs.median_us / ours.median_us, 3)
    return row


def clock_of(cpu_time: bool) -> Callable[[], float]:
    """Wall clock, or the processor time of the calling thread."""
    return time.thread_time if cpu_time else time.perf_counter


def machine(cpu_time: bool = False) -> dict[str, object]:
    """What times depend on: processor, threads, instruction set, load, versions, clock."""
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.resq.cpu_isa(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "clock": "thread processor time" if cpu_time else "wall",
    }


def _processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def alternate(
    candidates: Mapping[str, Callable[[int], object]],
    rounds: int = 7,
    burst_seconds: float = 0.01,
    max_calls: int = 32,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every candidate in turn, round after round, so that a slow phase hits all of them.

    Args:
        candidates: name -> call; its argument counts calls from 0, so that a call can use
            another copy of its data each time (cold caches).
        rounds: how often each candidate has its turn.
        burst_seconds: a turn repeats the call for about this long, after one call that is not
            counted because the caches still hold the other candidates' data.
        max_calls: most calls of a turn.
        clock: returns seconds. `time.thread_time` does not count the time that other processes
            take from the core, but counts only the calling thread: use it with a single thread.

    Raises:
        ValueError: there is nothing to time.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"alternate: expected candidates and rounds >= 1, got {rounds} rounds")
    bursts = {}
    for name, call in candidates.items():
        call(0)
        seconds = _timed(call, 1, clock)
        bursts[name] = min(max(int(burst_seconds / max(seconds, 1e-7)), 1), max_calls)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    index = 0
    for _ in range(rounds):
        for name, call in candidates.items():
            call(index)
            for _ in range(bursts[name]):
                index += 1
                samples[name].append(_timed(call, index, clock))
    return {
        name: Timing(
            median_us=statistics.median(times) * 1e6,
            best_us=min(times) * 1e6,
            calls=len(times),
        )
        for name, times in samples.items()
    }


def _timed(call: Callable[[int], object], index: int, clock: Callable[[], float]) -> float:
    start = clock()
    call(index)
    return clock() - start


def read_bandwidth(
    megabytes: int = 512, repeats: int = 20, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes per second that all threads together read: the best of `repeats` sums of a tensor.

    `megabytes`, its size, must be several times the last-level cache.
    """
    data = torch.ones(megabytes * 2**20 // 4)
    times = (_timed(lambda _: data.sum(), 0, clock) for _ in range(repeats))
    return data.numel() * data.element_size() / min(times)


def copy_bandwidth(
    megabytes: int = 256, repeats: int = 20, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes per second, read plus written, of a copy of a large tensor: the best of `repeats`."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    times = (_timed(lambda _: target.copy_(source), 0, clock) for _ in range(repeats))
    return 2 * source.numel() * source.element_size() / min(times)
