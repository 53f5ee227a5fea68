"""`resq bench`: the kernels against what a user would run instead, in one run."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from resq_kernels.bench import compare, models, report
from resq_kernels.commands import loading, output
from resq_kernels.commands.arguments import at_least, real

if TYPE_CHECKING:
    from resq_kernels.bench.device import BenchDevice

SUMMARY = "time the kernels against what a user would run instead"
DESCRIPTION = """\
Times a kernel and its alternatives in turn, in one run, after comparing its result with the
reference. share: the time that the memory or the integer instructions of this machine (both
measured in the run) would allow, over the time it took. ratio: the alternative's time over ours;
above 1 ours is faster.

  gemm       mixed_gemm against F.linear, and torch's int4, int8 and FP8 products where it has them
  quantize   the three quantizing operators against the same in plain torch
  hadamard   the transform against dense matrix products
  attention  one decode step over 4-bit pages against torch's attention on 16-bit caches
  prefill    attention of many new tokens, over dequantized pages, against kv_attention
  layer      one decoder layer, a decode step and a prefill, against BF16 transformers
  model      prefill, decode and memory of a model with random weights against BF16 transformers
  latency    every small kernel of a decode step in a chain of launches, its data in the caches
  peaks      the rates that the others are bound by: reading, copying, integer and BF16 products

examples:
  resq bench
  resq bench gemm --shapes Llama-3-8B,Qwen2.5-7B --batch 1,16,512 --out results/gemm
  resq bench attention --shapes llama-3-8b --batch 1,8 --context 4096,32768
  resq bench layer --shapes llama-3-8b --batch 1,8 --context 2048
  resq bench model --shapes llama-3-8b --layers 4 --batch 1,8 --context 512
  resq bench gemm --choices all --device cuda --shapes llama-3-8b --out sweep
  resq bench gemm --compare old.json        # times again, exit code 1 if something is slower
  resq bench --compare old.json new.json    # only compares
"""

# Benchmark -> its module (rows, MODELS, DEFAULTS), imported when it is asked for.
MODULES = {
    "peaks": "resq_kernels.bench.peaks",
    "gemm": "resq_kernels.bench.gemm",
    "quantize": "resq_kernels.bench.quantize",
    "hadamard": "resq_kernels.bench.hadamard",
    "attention": "resq_kernels.bench.attention",
    "prefill": "resq_kernels.bench.prefill",
    "layer": "resq_kernels.bench.layer",
    "model": "resq_kernels.bench.model",
    "latency": "resq_kernels.bench.latency",
}
OPTIONS = ("shapes", "batch", "context", "layers", "table_width")  # of some benchmarks only
CPU_COLD_MB = 128
FLUSH_SECONDS = 2.0  # between two writings of the rows so far


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq bench`."""
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=list(MODULES),
        default="gemm",
        help="what to time (default: gemm)",
    )
    parser.add_argument(
        "--shapes",
        type=_list_of(_model),
        metavar="A,B,...",
        help=f"of these models: {', '.join(_all_models())} (default: gemm square, 4096 x 4096; "
        "layer, model llama-3.2-1b; else llama-3-8b)",
    )
    parser.add_argument(
        "--batch",
        type=_list_of(at_least(1)),
        metavar="M,...",
        help="rows of the activations; attention, prefill, layer, model: sequences (default: "
        "gemm 1,4,16,64,512; attention 1,8; latency 1,16; prefill, layer, model 1; else 1,16,512)",
    )
    parser.add_argument(
        "--context",
        type=_list_of(at_least(1)),
        metavar="T,...",
        help="attention, layer, model: tokens of each sequence before the step, and of a prefill "
        "(default: 4096; layer, model 128; latency 1024); prefill: with those of the step "
        "(default: 2048)",
    )
    parser.add_argument(
        "--table-width",
        type=_list_of(at_least(1)),
        metavar="W,...",
        help="attention: block tables this many times as wide as the sequences (default: 1)",
    )
    parser.add_argument(
        "--layers",
        type=at_least(1),
        metavar="N",
        help="model: this many decoder layers instead of all, to fit the memory or the time",
    )
    parser.add_argument(
        "--choices",
        choices=("all",),
        help="gemm on a GPU: instead, time every kernel, tile and split of K that each shape may "
        "run, beside the one that is chosen (tools/fit_mixed_gemm.py reads PREFIX.json)",
    )
    loading.add_device_argument(parser)
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=7,
        metavar="N",
        help="turns of every candidate (default: 7)",
    )
    parser.add_argument(
        "--cold-mb",
        type=at_least(0),
        metavar="MB",
        help="data that a call passes before it sees the same again (default: "
        f"{CPU_COLD_MB}; cuda 200)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --threads 1: processor time, for a machine that runs other things too",
    )
    parser.add_argument(
        "--out",
        metavar="PREFIX",
        help="write PREFIX.json, PREFIX.md and PREFIX.png (speedup over M)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar=("OLD", "NEW"),
        help="compare this run with the JSON of an older one, or two files without running; "
        "exit code 1 if something is slower",
    )
    parser.add_argument(
        "--slower",
        type=real(0.0, 1000.0),
        default=5.0,
        metavar="PERCENT",
        help="with --compare: slower is a time that grew by more than this, with a ratio that fell "
        "by as much (default: 5)",
    )
    parser.add_argument(
        "--other-machine",
        action="store_true",
        help="with --compare: also compare runs of different machines",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the benchmark; writes --json and --out, then compares.

    Raises:
        UsageError: the benchmark does not know one of the models or options, --cpu-time with
            threads or on a GPU, --choices elsewhere than in gemm on a GPU, or a file of --json or
            --out cannot be written.
        CommandError: there is no such device, a kernel's result differs from the reference (the
            other rows are written), or something is slower than in --compare.
        ValueError: the files of --compare cannot be compared.
    """
    output.check_target(args.json)
    _check_out(args)
    if args.choices and (args.benchmark != "gemm" or args.compare):
        got = f"bench {args.benchmark}" + (" --compare" if args.compare else "")
        raise output.UsageError(f"--choices: expected bench gemm without --compare, got {got}")
    older, newer = _runs(args)
    if older is not None and newer is not None:
        _compare(args, older, newer)
        return
    import torch

    from resq_kernels.bench.device import BenchDevice

    module = importlib.import_module(MODULES[args.benchmark])
    _complete(args, module)
    bench = BenchDevice(
        device=args.device,
        rounds=args.rounds,
        cold_bytes=args.cold_mb * 2**20,
        cpu_time=args.cpu_time,
    )
    torch.manual_seed(0)
    machine = bench.machine()
    if older is not None and not args.other_machine:
        compare.check_machines(older["machine"], machine)
    figures: dict[str, Any] = {
        "command": shlex.join(["resq", *args.argv]),
        "machine": machine,
        "machine_after": machine,
        "peaks": {},
        "missing": {},
        "failures": bench.failures,
        "complete": False,
        "rows": [],
    }
    if args.choices:
        _sweep(args, bench, figures)
    else:
        _time(args, bench, module, figures)
    if bench.failures:
        raise output.CommandError("; ".join(bench.failures))
    if older is not None:
        _compare(args, older, figures)


def _check_out(args: argparse.Namespace) -> None:
    """Refuses a PREFIX whose files cannot be written, or are those of --json."""
    if args.out is None:
        return
    if not args.out or args.out.endswith("/"):
        raise output.UsageError(f"--out: expected the beginning of a file's name, got {args.out!r}")
    paths = [f"{args.out}.{suffix}" for suffix in ("json", "md", "png")]
    for path in paths:
        output.check_target(path, "--out", special=False)
    if args.json and os.path.realpath(args.json) in map(os.path.realpath, paths[1:]):
        raise output.UsageError(
            f"--json: expected another file than those of --out, got {args.json}"
        )


def _time(
    args: argparse.Namespace, bench: BenchDevice, module: ModuleType, figures: dict[str, Any]
) -> None:
    """Times a benchmark's rows."""
    print(report.HEADER)
    written = time.monotonic()
    with _kept(bench, figures, lambda: _write(args, figures)):
        for row in module.rows(bench, args, figures["missing"]):
            figures["rows"].append(row)
            print(report.line(row), flush=True)
            if args.out and time.monotonic() > written + FLUSH_SECONDS:  # a kernel may hang
                output.write_json(f"{args.out}.json", figures)
                written = time.monotonic()


@contextmanager
def _kept(bench: BenchDevice, figures: dict[str, Any], write: Callable[[], None]) -> Iterator[None]:
    """Writes the figures at the end; a run that is stopped keeps what it has, not `complete`."""
    try:
        yield
        figures["complete"] = True
    finally:
        figures |= {"machine_after": bench.machine(), "peaks": bench.peaks()}
        write()


def _write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Prints what is missing; writes the files of --json and --out."""
    for name, reason in figures["missing"].items():
        print(f"no {name}: {reason}")
    output.write_json(args.json, figures)
    if args.out:
        output.write_json(f"{args.out}.json", figures)
        for sentence in report.write(Path(args.out), figures):
            sys.stderr.write(f"resq: {sentence}\n")


def _sweep(args: argparse.Namespace, bench: BenchDevice, figures: dict[str, Any]) -> None:
    """Times every choice; the files of --out are written anew after each batch of each layer."""
    import torch

    from resq_kernels.bench import choices

    names = ("major", "minor", "multiprocessors", "memory_bits")
    facts = dict(zip(names, torch.ops.resq.cuda_device(0), strict=True))
    figures |= {"device": facts | {"family": bench.kernels}, "choices": []}
    table: list[list[str]] = []

    def write_out() -> None:
        if args.out:
            output.write_json(f"{args.out}.json", figures)
            report.write_table(Path(args.out), figures, choices.HEADER, table)

    def write() -> None:
        output.write_json(args.json, figures)
        write_out()

    print(choices.line(choices.HEADER))
    with _kept(bench, figures, write):
        for batch in choices.sweep(bench, args):
            figures["choices"] += batch
            table.append(choices.cells(batch))
            print(choices.line(table[-1]), flush=True)
            write_out()  # a kernel may hang


def _runs(args: argparse.Namespace) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The figures of --compare: of OLD and of NEW, None for a file that is not given."""
    paths = args.compare or []
    if len(paths) > 2 or (len(paths) == 2 and args.out):
        raise output.UsageError("--compare: expected OLD, or OLD and NEW without --out")
    older, newer, *_ = [*map(compare.read, paths), None, None]
    return older, newer


def _compare(args: argparse.Namespace, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Prints what became of every row that both runs have; fails if one is slower."""
    if not args.other_machine:
        compare.check_machines(old["machine"], new["machine"])
    rows = compare.compare(old["rows"], new["rows"], args.slower)
    print(output.table([compare.cells(row) for row in rows], compare.HEADER))
    left_out = len(old["rows"]) + len(new["rows"]) - 2 * len(rows)
    print(f"{len(rows)} rows in both, {left_out} in one alone")
    if len(args.compare) > 1:
        output.write_json(args.json, {"compare": args.compare, "rows": rows})
    if slower := sum(row["slower"] for row in rows):
        raise output.CommandError(
            f"{slower} of {len(rows)} rows are more than {args.slower:g} % slower than in "
            f"{args.compare[0]}"
        )


def _complete(args: argparse.Namespace, module: ModuleType) -> None:
    """Fills in the defaults of the benchmark and of the device; refuses what does not fit."""
    import torch

    from resq_kernels.bench import cuda_timing

    for name in OPTIONS:
        if name not in module.DEFAULTS and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise output.UsageError(f"bench {args.benchmark}: it has no option --{option}")
    for name, value in module.DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for model in args.shapes or ():
        if model not in module.MODELS:
            raise output.UsageError(
                f"bench {args.benchmark}: --shapes: expected one of {', '.join(module.MODELS)}, "
                f"got {model!r}"
            )
    args.device = loading.choose_device(args.device)
    if args.choices and args.device != "cuda":
        raise output.UsageError(
            f"--choices times CUDA kernels: expected --device cuda, got {args.device}"
        )
    if args.cold_mb is None:
        args.cold_mb = CPU_COLD_MB if args.device == "cpu" else cuda_timing.COLD_BYTES >> 20
    if args.cpu_time and args.device != "cpu":
        raise output.UsageError("--cpu-time counts the processor's time: add --device cpu")
    if args.cpu_time and torch.get_num_threads() != 1:
        raise output.UsageError("--cpu-time counts the calling thread alone: add --threads 1")


def _all_models() -> list[str]:
    return [models.SQUARE, *models.names()]


def _list_of(convert: Callable[[str], object]) -> Callable[[str], list[object]]:
    return lambda text: [convert(part.strip()) for part in text.split(",")]


def _model(name: str) -> str:
    if name.lower() not in _all_models():
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(_all_models())}, got {name!r}"
        )
    return name.lower()
