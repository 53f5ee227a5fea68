"""`resq bench`: the kernels beside what a user would run instead, in one run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch

from resq_kernels.commands import output
from resq_kernels.commands.arguments import at_least

SUMMARY = "time the kernels beside what a user would run instead"
DESCRIPTION = """\
Times a kernel and its alternatives in turn, in one run, after comparing its result with the
reference. share: the time that memory bandwidth or the integer instructions of this machine (both
measured first) would allow, over the time it took. ratio: the alternative's time over ours; above 1
ours is faster.

examples:
  resq bench
  resq bench gemm --shapes llama-3-8b --batch 1,16,512 --json gemm.json
  resq bench attention --shapes llama-3-8b --batch 1,8 --context 4096,32768
"""

# Benchmark -> its module (run; imported when it is asked for) and the models whose shapes it knows.
MODULES = {
    "gemm": "resq_kernels.testing.bench_mixed_gemm",
    "attention": "resq_kernels.testing.bench_kv_attention",
}
MODELS = {
    "gemm": ("square", "llama-3.2-1b", "llama-3-8b", "qwen2.5-7b"),
    "attention": ("llama-3.2-1b", "llama-3-8b", "qwen2.5-0.5b", "qwen2.5-7b"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq bench`."""
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=list(MODULES),
        default="gemm",
        help="gemm (default): mixed_gemm beside F.linear in FP32 and BF16 and torch's int4 "
        "weights; attention: one decode step over 4-bit pages beside torch's on 16-bit caches",
    )
    parser.add_argument(
        "--shapes",
        type=_list_of(_model),
        metavar="A,B,...",
        help=f"of these models: {', '.join(_all_models())} (default: gemm square, 4096 x 4096; "
        "attention llama-3-8b)",
    )
    parser.add_argument(
        "--batch",
        type=_list_of(at_least(1)),
        metavar="M,...",
        help="gemm: rows of the activations (default: 1,4,16,64,512); attention: sequences "
        "(default: 1,8)",
    )
    parser.add_argument(
        "--context",
        type=_list_of(at_least(1)),
        default=[4096],
        metavar="T,...",
        help="attention: cached tokens of each sequence (default: 4096)",
    )
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
        default=128,
        metavar="MB",
        help="data that a call passes before it sees the same again (default: 128)",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --threads 1: processor time, for a machine that runs other things too",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the benchmark; writes --json last.

    Raises:
        CommandError: the benchmark does not know one of the models, or --cpu-time with threads.
        RuntimeError: a kernel's result differs from the reference.
    """
    output.check_json_target(args.json)
    for model in args.shapes or []:
        if model not in MODELS[args.benchmark]:
            known = ", ".join(MODELS[args.benchmark])
            raise output.CommandError(
                f"bench {args.benchmark}: --shapes: expected one of {known}, got {model!r}"
            )
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_time and torch.get_num_threads() != 1:
        raise output.CommandError("--cpu-time counts the calling thread alone: add --threads 1")
    output.write_json(args.json, importlib.import_module(MODULES[args.benchmark]).run(args))


def _all_models() -> list[str]:
    return list(dict.fromkeys(name for names in MODELS.values() for name in names))


def _list_of(convert: Callable[[str], object]) -> Callable[[str], list]:
    return lambda text: [convert(part.strip()) for part in text.split(",")]


def _model(name: str) -> str:
    if name not in _all_models():
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(_all_models())}, got {name!r}"
        )
    return name
