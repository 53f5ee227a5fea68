"""The device that a benchmark runs on: its clock, its cold data and its measured peaks."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from resq_kernels import ops  # noqa: F401  registers torch.ops.resq.*
from resq_kernels.bench import cuda_timing, int_rate, timing
from resq_kernels.bench.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
INT8_CEILING = ROOT / "benchmarks/cuda/int8_ceiling.so"  # built beforehand, docs/cuda.md

Call = Callable[[int], Any]
Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one call, from which its roofline bound follows.

    Attributes:
        op: the operator.
        place: the row's keys that say what was timed: model, layer, batch, shape, ...
        moved: bytes that it has to read or write.
        products: integer products that it has to compute; None where memory alone is the bound.
        copies: whether it writes about as much as it reads, so that its memory bound takes the
            bandwidth of a copy instead of that of reading.
    """

    op: str
    place: Row
    moved: float
    products: float | None = None
    copies: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchDevice:
    """Where and how to time.

    Attributes:
        device: "cpu" or "cuda".
        rounds: how often each candidate has its turn.
        cold_bytes: bytes of other data between two uses of the same copy, to keep caches cold.
        cpu_time: processor time of the one thread instead of wall time (CPU).
        failures: sentences about what was wrong and is therefore not timed; `attempted` adds them.
    """

    device: str = "cpu"
    rounds: int = 7
    cold_bytes: int = 0
    cpu_time: bool = False
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def copy_count(self, size: int) -> int:
        """How many copies of `size` bytes it takes for each to be cold when its turn comes."""
        count = 1 + self.cold_bytes // max(size, 1)
        return min(count, cuda_timing.MOST_COPIES) if self.on_gpu else count

    def copies(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """`tensor` and enough clones that each is cold when its turn comes."""
        return [tensor, *(tensor.clone() for _ in range(self.copy_count(nbytes(tensor)) - 1))]

    def available(
        self, makers: Iterable[tuple[str, Callable[[], Call]]], missing: dict[str, str]
    ) -> dict[str, Call]:
        """name -> call, of the alternatives that run with this torch, device and memory.

        Args:
            makers: names, and functions that set up the call, which is then tried once.
            missing: receives name -> reason for each of the others.
        """
        found: dict[str, Call] = {}
        for name, make in makers:
            try:
                call = make()
                self.attempt(call)
            except Exception as error:  # whatever it lacks, it costs its own rows alone
                missing[name] = first_line(error)
            else:
                found[name] = call
        return found

    def attempt(self, call: Call) -> None:
        """Runs a call once, on a GPU inside a graph."""
        if self.on_gpu:
            cuda_timing.capture(call, 1).replay()
            torch.cuda.synchronize()
        else:
            call(0)

    def attempted(self, measure: Callable[[], Iterable[T]]) -> Iterator[T]:
        """The rows of one measurement. One that fails is a sentence in `failures`, so that it costs
        its own rows and not those of the others."""
        try:
            yield from measure()
        except Exception as error:
            named = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            self.failures.append(f"{named}{error}")

    def alternate(
        self,
        candidates: Mapping[str, Call],
        *,
        eager: bool = False,
        calls: int = cuda_timing.CALLS_A_GRAPH,
    ) -> dict[str, Timing]:
        """Times the candidates in turn.

        Args:
            candidates: name -> call; its argument counts calls, to choose the copy of the data.
            eager: on a GPU, time each call as Python launches it, instead of CUDA graphs of calls.
            calls: on a GPU, calls in a graph.
        """
        if self.on_gpu and not eager:
            return cuda_timing.alternate(candidates, self.rounds, calls)
        clock = cuda_timing.clock if self.on_gpu else timing.clock_of(self.cpu_time)
        return timing.alternate(candidates, self.rounds, clock=clock)

    @functools.cached_property
    def read_bandwidth(self) -> float:
        """Bytes a second that the whole device reads."""
        if self.on_gpu:
            return cuda_timing.read_bandwidth()
        return timing.read_bandwidth(clock=timing.clock_of(self.cpu_time))

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second, read plus written, of a copy of a large tensor."""
        if self.on_gpu:
            return cuda_timing.copy_bandwidth()
        return timing.copy_bandwidth(clock=timing.clock_of(self.cpu_time))

    @functools.cached_property
    def products_per_second(self) -> float | None:
        """Integer products of the instructions that the kernels use; None where not measurable."""
        try:
            if not self.on_gpu:
                return int_rate.integer_rate(torch.get_num_threads())
            operations = cuda_timing.int8_rate(INT8_CEILING)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            sys.stderr.write(f"resq: the rate of integer products is not measured: {error}\n")
            return None
        return operations / 2 if operations else None

    def peaks(self) -> dict[str, float | None]:
        """The peak rates that have been measured so far."""
        known = ("read_bandwidth", "copy_bandwidth", "products_per_second")
        keys = ("read_bytes_per_second", "copy_bytes_per_second", "integer_products_per_second")
        return {key: vars(self)[n] for n, key in zip(known, keys, strict=True) if n in vars(self)}

    @functools.cached_property
    def kernels(self) -> str:
        """Which kernels run: the instruction set of a CPU, the family of a GPU."""
        if self.on_gpu:
            return str(torch.ops.resq.cuda_family(0))
        return str(torch.ops.resq.cpu_isa())

    def machine(self) -> dict[str, object]:
        """What times depend on; under `gpu` also clocks and throttling, where one is used."""
        stamp = timing.machine(self.cpu_time) | {"commit": commit(), "device": self.device}
        return stamp | ({"gpu": cuda_timing.device()} if self.on_gpu else {})

    def rows(self, work: Work, times: Mapping[str, Timing]) -> list[Row]:
        """One row for each alternative to "ours", or a single row if there is none.

        Args:
            work: what was timed; the result of "ours" must have been checked.
            times: of "ours" and its alternatives.
        """
        ours = times["ours"]
        bandwidth = self.copy_bandwidth if work.copies else self.read_bandwidth
        memory_bound = work.moved / bandwidth * 1e6
        rate = None if work.products is None else self.products_per_second
        compute_bound = work.products / rate * 1e6 if work.products and rate else None
        bound = max(memory_bound, compute_bound or 0.0)
        common: Row = {
            "op": work.op,
            "kernel": self.kernels,
            **work.place,
            "ours_tflops": work.products and round(2 * work.products / ours.median_us / 1e6, 3),
            "ours_gb_per_s": round(work.moved / ours.median_us / 1e3, 2),
            "memory_bound_us": round(memory_bound, 2),
            "compute_bound_us": compute_bound and round(compute_bound, 2),
            "ceiling_share": round(bound / ours.median_us, 3),
            "checked": True,
        }
        others = [name for name in times if name != "ours"]
        if not others:
            return [common | timing.against(ours, None, None)]
        return [common | timing.against(ours, name, times[name]) for name in others]


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def evenly_spaced(size: int, most: int = 64) -> torch.Tensor:
    """Which rows of a result to check: int64, all of `size` or `most` from the first to the last.

    References compute in float64 on the CPU, slowly.
    """
    return torch.linspace(0, size - 1, min(size, most)).long()


def nbytes(*values: object) -> int:
    """Bytes of all tensors, also inside tuples and lists; other values count as none."""
    return sum(
        value.numel() * value.element_size()
        if isinstance(value, torch.Tensor)
        else nbytes(*value)
        if isinstance(value, (tuple, list))
        else 0
        for value in values
    )


@functools.cache
def commit() -> str:
    """The commit of the source: RESQ_COMMIT, else git's; "unknown" outside a checkout."""
    if given := os.environ.get("RESQ_COMMIT"):
        return given
    if not (ROOT / ".git").exists():  # an installed wheel may lie in another project's checkout
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
