"""The same model in resq_kernels and in llama.cpp, in turn, on the same cores.

llama.cpp comes from the package index, compiled for the machine:

    pip install llama-cpp-python gguf

MODEL is a folder that `resq quantize` wrote, raced against the GGUF file of its 16-bit source:

    python benchmarks/llama_cpp_race.py out/resq --gguf smol.Q4_1.gguf --reference smol --text t.txt

or the name of a shape, both sides with random weights; with :LAYERS, of so many layers:

    python benchmarks/llama_cpp_race.py llama-3.2-1b --out race-1b

llama.cpp runs as Q4_0, Q4_1 and Q4_K_M, with keys and values in F16, Q8_0 and Q4_0, with and
without flash attention. Every combination is tried once; the best of each type then runs in turn
with ours, and the row names the fastest. Both sides get the same tokens and stop at the logits of
the last one (of a batch: of each last one); neither samples. Ours decodes by `DecodeGraph`, whose
cache holds one token where the context is empty. Both are compared with the 16-bit
model in the same run: perplexity, divergence, agreement.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp_engines import CACHES, NEW_TOKENS, Cache, Float, LlamaCpp, Ours, Remote, Test
from llama_cpp_files import quantized, random_weights

from resq_kernels import texts
from resq_kernels.bench import models, report, timing
from resq_kernels.commands.arguments import at_least
from resq_kernels.commands.loading import load_tokenizer
from resq_kernels.commands.output import check_target, table, write_json
from resq_kernels.evaluate import Measured, cut_windows, window_sums

TESTS = {
    "pp128": Test(prompt=128),
    "pp512": Test(prompt=512),
    "pp4096": Test(prompt=4096),
    "tg@0": Test(),
    "tg@1k": Test(context=1024),
    "tg@8k": Test(context=8192 - NEW_TOKENS),
    "batch8": Test(batch=8),
}
"""pp: tokens of a prompt. tg: tokens decoded one by one after a context; batch8: eight at once."""
LONG = 1024
"""Positions from which on every cache is tried, of the winner of SHORT alone if that has run."""
SHORT = {True: "pp512", False: "tg@0"}
"""The test that says which type that is, for prompts and for decoding."""
LOADS = 3
OURS = "ours"
VOCABULARY = 32000
"""Tokens are drawn from this many, which every model has."""
HEADER = ("model", "test", "ours, tokens/s", "llama.cpp", "ratio", "llama.cpp's fastest")


def main(argv: Sequence[str] | None = None) -> None:
    """Races, prints the tables, and writes PREFIX.json and PREFIX.md."""
    args = _arguments(argv)
    name = Path(args.reference).name if args.reference else args.model
    model = args.model if args.reference else _shape(args.model)
    source = args.gguf or random_weights(*model, args.work)
    files = quantized(source, args.work, args.threads)
    engines: dict[str, tuple[Any, ...]] = {OURS: (Ours, model, args.lo_bits, args.threads)}
    engines |= {kind: (LlamaCpp, str(path), args.threads) for kind, path in files.items()}
    torch.set_num_threads(args.threads)  # for what `machine` says
    figures: dict[str, Any] = {
        "command": " ".join(["python benchmarks/llama_cpp_race.py", *(argv or sys.argv[1:])]),
        "machine": timing.machine() | {"llama-cpp-python": version("llama-cpp-python")},
        "lo_bits": args.lo_bits,
        "bytes": {kind: path.stat().st_size for kind, path in files.items()},
        "rows": [],
    }
    if args.reference:
        parts = Path(args.model).glob("*.safetensors")
        figures["bytes"][OURS] = sum(path.stat().st_size for path in parts)
        figures["load"] = _loads(engines)
    with ExitStack() as stack:
        running = {
            kind: stack.enter_context(closing(Remote(*engine))) for kind, engine in engines.items()
        }
        if args.reference:
            figures["quality"] = _quality(running, args)
        elif reason := running[OURS]("why_wrong"):
            raise SystemExit(f"{name}: {reason}")
        fastest: dict[str, str] = {}
        for test in args.tests:
            row = {"model": name, "test": test, **_race(running, test, fastest, args.rounds)}
            figures["rows"].append(row)
            print("  ".join(_cells(row)), file=sys.stderr)
    rows = list(map(_cells, figures["rows"]))
    print(table(rows, HEADER))
    for key in ("load", "quality"):
        if key in figures:
            print(f"\n{_figures_table(figures[key])}")
    if args.out:
        write_json(f"{args.out}.json", figures)
        report.write_table(args.out, {"peaks": {}, "missing": {}, **figures}, HEADER, rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a quantized folder, or NAME[:LAYERS] of resq bench model")
    add("--gguf", type=Path, metavar="FILE", help="the 16-bit source of the folder, as GGUF")
    add("--reference", metavar="FOLDER", help="the same source as a Hugging Face folder")
    add("--text", metavar="FILE", help="text on which both sides are compared with it")
    add("--windows", type=at_least(1), default=4, metavar="N", help="its windows (default: 4)")
    add(
        "--seqlen",
        type=at_least(2),
        default=1024,
        metavar="L",
        help="of these tokens (default: 1024)",
    )
    add("--tests", nargs="+", choices=TESTS, default=list(TESTS), metavar="T", help=str([*TESTS]))
    add("--lo-bits", type=int, choices=(4, 8), default=8, help="ours: bits of the activations")
    add("--threads", type=at_least(1), default=2, metavar="N", help="of either side (default: 2)")
    add("--rounds", type=at_least(1), default=5, metavar="N", help="turns of each (default: 5)")
    add("--work", type=Path, default=Path("out/race"), help="keeps the GGUF files made here")
    add("--out", type=Path, metavar="PREFIX", help="writes PREFIX.json and PREFIX.md")
    args = parser.parse_args(argv)
    folder = Path(args.model).is_dir()
    for option in ("gguf", "reference", "text"):
        if (getattr(args, option) is None) == folder:
            word = "needed beside a folder" if folder else f"no option beside {args.model}"
            parser.error(f"--{option}: {word}, which is {'one' if folder else 'no folder'}")
    if not folder:
        try:
            config = models.configuration(*_shape(args.model))
        except (KeyError, argparse.ArgumentTypeError):
            parser.error(f"MODEL: expected a folder or NAME[:LAYERS], got {args.model}")
        if config["model_type"] != "llama":
            parser.error(f"MODEL: expected a Llama, got {args.model}")
    if args.out:
        for suffix in ("json", "md"):
            check_target(f"{args.out}.{suffix}", "--out")
    return args


def _shape(model: str) -> tuple[str, int | None]:
    name, colon, layers = model.partition(":")
    return name, at_least(1)(layers) if colon else None


def _race(
    running: Mapping[str, Remote], test: str, fastest: dict[str, str], rounds: int
) -> dict[str, Any]:
    """Tokens/s of a test: ours, the fastest of llama.cpp's, and what was tried."""
    work = TESTS[test]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (work.batch, work.positions))
    kinds = [kind for kind in running if kind != OURS]
    if work.positions >= LONG and (found := fastest.get(SHORT[work.prompt > 0])):
        kinds = [found]
    caches = CACHES if work.positions >= LONG else [c for c in CACHES if c.kind == "f16"]
    tried: dict[tuple[str, Cache], float] = {}
    for kind in kinds:
        for cache in caches:
            running[kind]("prepare", work, tokens, cache)
            running[kind]("run")
            tried[kind, cache] = running[kind]("run")
    best = {kind: min(caches, key=lambda cache: tried[kind, cache]) for kind in kinds}
    for kind, cache in {OURS: None, **best}.items():
        running[kind]("prepare", work, tokens, cache)
        running[kind]("run")
    seconds: dict[str, list[float]] = {kind: [] for kind in (OURS, *best)}
    for _ in range(rounds):
        for kind, times in seconds.items():
            times.append(running[kind]("run"))
    for kind in seconds:
        running[kind]("finish")
    speed = {kind: work.tokens / statistics.median(times) for kind, times in seconds.items()}
    ours = speed.pop(OURS)
    winner = max(speed, key=speed.__getitem__)
    fastest[test] = winner
    return {
        "ours": round(ours, 2),
        "best_llama_cpp": round(speed[winner], 2),
        "which": f"{winner}, {best[winner]}",
        "ratio": round(ours / speed[winner], 3),
        "rounds": {kind: [round(work.tokens / t, 2) for t in seconds[kind]] for kind in seconds},
        "tried": {f"{kind}, {c}": round(work.tokens / t, 2) for (kind, c), t in tried.items()},
    }


def _loads(engines: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """Of fresh processes, in turn: seconds to the first token (median; imports are not counted),
    and peak memory after a prompt of 512, whole and beyond that of the imports."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in engines}
    tokens = np.zeros((1, 512), np.int64)
    for _ in range(LOADS):
        for kind, engine in engines.items():
            with closing(Remote(*engine)) as process:
                process("prepare", TESTS["pp512"], tokens)
                process("run")
                found[kind].append(process("load"))
    return {
        kind: {key: statistics.median(load[key] for load in loads) for key in loads[0]}
        for kind, loads in found.items()
    }


def _quality(
    running: Mapping[str, Remote], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Perplexity, KL(16-bit || engine) in nats and top-1 agreement over all targets."""
    text = texts.read_text(Path(args.text))
    ids = texts.tokenize(load_tokenizer(args.reference), text)
    windows = cut_windows(ids, args.seqlen, args.windows)
    found = {kind: Measured([], args.seqlen - 1, 0.0) for kind in ("16-bit", *running)}
    with closing(Remote(Float, args.reference, args.threads)) as reference:
        for window in windows:
            true = None
            for kind, engine in {"16-bit": reference, **running}.items():
                logits = torch.from_numpy(engine("logits", window.numpy()))[:-1]
                found[kind].sums.append(window_sums(logits, window, true))
                true = logits if true is None else true
    return {
        kind: {"perplexity": one.perplexity, "kl": one.kl, "top1": one.top1}
        for kind, one in found.items()
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    speeds = [f"{row[key]:.1f}" for key in ("ours", "best_llama_cpp")]
    return [row["model"], row["test"], *speeds, f"{row['ratio']:.2f}", row["which"]]


def _figures_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    keys = list(next(iter(figures.values())))
    rows = [[kind, *(f"{values[key]:.4g}" for key in keys)] for kind, values in figures.items()]
    return table(rows, ["", *keys])


if __name__ == "__main__":
    main()
