"""`resq bench`: the kernels beside what a user would run instead, in one run."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from resq_kernels.commands import output

SUMMARY = "time the kernels beside what a user would run instead"
DESCRIPTION = """\
Times a kernel and its alternatives in turn, in one run, after comparing its result with the
reference. share: the time that memory bandwidth or the integer instructions of this machine (both
measured first) would allow, over the time it took. ratio: the alternative's time over ours; above 1
ours is faster.

examples:
  resq bench
  resq bench gemm --shapes llama-3-8b --batch 1,16,512 --json gemm.json
"""

# Benchmark -> module with add_arguments and run; imported when it is asked for.
BENCHMARKS = {"gemm": "resq_kernels.testing.bench_mixed_gemm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq bench`."""
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=sorted(BENCHMARKS),
        default="gemm",
        help="gemm: mixed_gemm beside F.linear in FP32 and BF16 and torch's int4 weights (default)",
    )
    for name in BENCHMARKS:
        _module(name).add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the benchmark; writes --json last.

    Raises:
        RuntimeError: a kernel's result differs from the reference.
    """
    output.check_json_target(args.json)
    output.write_json(args.json, _module(args.benchmark).run(args))


def _module(name: str) -> ModuleType:
    return importlib.import_module(BENCHMARKS[name])
