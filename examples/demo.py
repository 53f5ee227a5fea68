"""The main job, end to end, on a small Llama: calibrate, quantize, save, load, measure, talk.

Runs on any machine without a download, in about two minutes on two cores. Two models are compared:
the small Llama in this folder, and the same function with outlier channels planted as real large
models have them (outliers.py). Of each: the 16-bit model, plain 4-bit rounding, rotation only, and
ResQ with two ways to round weights; every quantized row goes through a saved Hugging Face folder
and the real kernels, on the same text, in the same run.

    python examples/demo.py            # results under out/demo/
    python examples/demo.py --quick    # the model with outliers on a few windows, for tests

Exits with 1 when the figures are not what the method promises, and says which.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# The matrices are so small that threads which spin while they wait cost more than the work where
# other programs use the cores too: one quantization took 88 s instead of 26 s at a load of 7.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from demo_report import write_report
from outliers import OutlierStrengths, outlier_report, plant_outliers, save_folder
from stdlib_corpus import calibration_text, heldout_text
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import resq_kernels
from resq_kernels import ResQConfig
from resq_kernels.commands.info import machine
from resq_kernels.commands.output import size, table, write_json
from resq_kernels.commands.sizes import part_sizes
from resq_kernels.evaluate import perplexity
from resq_kernels.ptq.calibrate import windows
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.testing.lockstep import lockstep
from resq_kernels.texts import tokenize

HERE = Path(__file__).resolve().parent
PROMPT = "The with statement is used to"
SAMPLE_TOKENS = 56

PLAIN, OUTLIERS = "small Llama", "small Llama with planted outliers"
BASELINE = "16-bit"
RTN, ROTATION, RESQ_RTN, RESQ_GPTQ = "RTN", "rotation only", "ResQ, RTN", "ResQ, GPTQ"
VARIANTS: dict[str, dict[str, str]] = {
    RTN: {"method": "rtn", "weights": "rtn"},
    ROTATION: {"method": "quarot", "weights": "gptq"},
    RESQ_RTN: {"method": "resq", "weights": "rtn"},
    RESQ_GPTQ: {"method": "resq", "weights": "gptq"},
}
LEGEND = """\
All quantized rows: weights, activations and KV cache in 4 bits (ResQ keeps 1/8 of every dimension
in 8). RTN: round to nearest. Rotation only: random Hadamard rotation, GPTQ weights (as QuaRot).
ResQ: PCA bases and rotations, weights by RTN or GPTQ. KL: mean divergence from the 16-bit model,
which tells more than the perplexity of one text. Linears: bytes of the decoder's linear layers,
scales included. The model is so small that its speed says little about the kernels; `resq bench`
measures real sizes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        samples, seqlen: calibration windows and the tokens of a window.
        windows: evaluation windows of `seqlen` tokens.
        check_windows: windows on which the kernels are compared with the reference path
            (resq_kernels.testing.lockstep).
        new_tokens, rounds: tokens of a timed generation, and how often it is timed.
    """

    samples: int = 32
    seqlen: int = 512
    windows: int = 48
    check_windows: int = 8
    new_tokens: int = 48
    rounds: int = 5


QUICK = Settings(samples=8, seqlen=256, windows=16, check_windows=2, new_tokens=8, rounds=1)
# Four channels of every norm 32 times larger: plain rounding then costs about as much as published
# for Llama-3 (perplexity of RTN over 16-bit: 36 for 8B, 34 for 3.2-1B and 3.2-3B; arXiv 2412.14363,
# Table 1). Methods that fold the norms into the weights undo this kind of outlier and face the
# others: concentrated residual directions, keys, values and MLP channels.
STRENGTHS = OutlierStrengths(norm_factor=32.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a model's table; times are medians.

    Attributes:
        name: "16-bit" or a key of VARIANTS.
        folder: where the model lies.
        perplexity, increase: on the held-out text; share above the 16-bit row's.
        kl_to_baseline: mean KL(16-bit || row) over the same targets, in nats.
        bytes_total, bytes_linears: of the checkpoint; of the decoder's linears with their scales.
        decode_tokens_per_second: greedy generation, batch 1.
        prefill_tokens_per_second: one window at once.
        quantize_seconds: calibration included; None for the 16-bit row.
        layers: name and relative output error of every quantized linear.
    """

    name: str
    folder: str
    perplexity: float
    increase: float
    kl_to_baseline: float
    bytes_total: int
    bytes_linears: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    quantize_seconds: float | None
    layers: list[dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A promise and what was measured."""

    model: str
    promise: str
    measured: str
    ok: bool


def say(text: str) -> None:
    """A line of progress on stdout, with the seconds since the start."""
    print(f"[{time.perf_counter() - _START:5.0f} s] {text}", flush=True)


_START = time.perf_counter()


def load(folder: Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The model of a folder, 16-bit or quantized, the way a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def plant(source: Path, out: Path, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Writes the same function with outlier channels; how far they stand out, before and after."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        before = outlier_report(model, ids[:4])
        plant_outliers(model, ids, STRENGTHS)
        after = outlier_report(model, ids[:4])
    save_folder(out, model.to(torch.bfloat16), AutoTokenizer.from_pretrained(source))
    return {name: {"before": before[name], "after": after[name]} for name in before}


def speeds(
    models: dict[str, PreTrainedModel], tokens: torch.Tensor, settings: Settings
) -> dict[str, tuple[float, float]]:
    """Decode and prefill tokens/s of each model: medians of rounds in which all take turns."""
    prompt, window = tokens[None, :32], tokens[None, : settings.seqlen]
    times: dict[str, tuple[list, list]] = {name: ([], []) for name in models}
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for turn in tqdm(range(settings.rounds + 1), desc="speed", delay=2, leave=False):
        for name, model in models.items():
            with torch.inference_mode():
                began = time.perf_counter()
                model(input_ids=window, use_cache=False)
                prefilled = time.perf_counter()
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=settings.new_tokens,
                    **options,
                )
                done = time.perf_counter()
            if turn:  # the first round warms up
                times[name][0].append(settings.new_tokens / (done - prefilled))
                times[name][1].append(settings.seqlen / (prefilled - began))
    return {
        name: (statistics.median(decode), statistics.median(prefill))
        for name, (decode, prefill) in times.items()
    }


def compare(
    label: str, source: Path, out: Path, settings: Settings, calibration: torch.Tensor
) -> tuple[dict[str, object], list[Check]]:
    """Quantizes a model in every way, measures all rows, and checks the promises.

    Returns:
        For the results: name, rows, spectra of the bases, samples of the first and the last row
        side by side; and the checks.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    characters = 8 * settings.windows * settings.seqlen
    heldout = tokenize(tokenizer, heldout_text(characters))
    out.mkdir(parents=True)
    folders, reports = {BASELINE: source}, {}
    for name, options in VARIANTS.items():
        say(f"{label}: quantize, {name}")
        folders[name] = out / name.lower().replace(", ", "-").replace(" ", "-")
        config = ResQConfig(samples=settings.samples, seqlen=settings.seqlen, **options)
        reports[name] = quantize_folder(source, folders[name], calibration, config)
    say(f"{label}: load the saved folders and measure them on the held-out text")
    models = {name: load(folder) for name, folder in folders.items()}
    measured = {
        name: perplexity(
            model,
            heldout,
            seqlen=settings.seqlen,
            max_windows=settings.windows,
            reference=models[BASELINE],
            progress=f"perplexity, {name}",
        )
        for name, model in models.items()
    }
    say(f"{label}: speed")
    speed = speeds(models, heldout, settings)
    rows = []
    for name in models:
        parts = part_sizes(folders[name])
        rows.append(
            Row(
                name=name,
                folder=str(folders[name]),
                perplexity=measured[name].perplexity,
                increase=measured[name].perplexity / measured[BASELINE].perplexity - 1,
                kl_to_baseline=measured[name].kl_to_reference,
                bytes_total=parts["total"],
                bytes_linears=parts["linears"] + parts["linear_scales"],
                decode_tokens_per_second=speed[name][0],
                prefill_tokens_per_second=speed[name][1],
                quantize_seconds=reports[name]["seconds"] if name in reports else None,
                layers=reports[name]["layers"] if name in reports else [],
            )
        )
    say(f"{label}: kernels against the reference path")
    agreement = reference_check(label, folders[RESQ_GPTQ], heldout, settings)
    checks = [*promises(label, {row.name: row for row in rows}), agreement]
    results = {
        "name": label,
        "rows": [asdict(row) for row in rows],
        "samples": side_by_side(models, tokenizer),
        "spectra": reports[RESQ_GPTQ]["spectra"],
    }
    print(f"\n{label}\n\n{table([cells(row) for row in rows], HEADER)}\n", flush=True)
    print(textwrap.indent(results["samples"], "  ") + "\n", flush=True)
    return results, checks


def reference_check(label: str, folder: Path, heldout: torch.Tensor, settings: Settings) -> Check:
    """Perplexity through the kernels against the plain torch path along the same codes.

    In float32 outside the kernels, so that a disagreement is theirs and not bfloat16's.
    """
    model, seqlen = load(folder, torch.float32), settings.seqlen
    logs, flipped, values = torch.zeros(2, dtype=torch.float64), 0, 0
    cut = heldout[: settings.check_windows * seqlen].split(seqlen)
    for window in tqdm(cut, desc="reference", unit="window", delay=2, leave=False):

        def run(window: torch.Tensor = window) -> float:
            return math.log(perplexity(model, window, seqlen=seqlen).perplexity)

        with lockstep(model, run) as (kernels, agreement):
            logs += torch.tensor([kernels, run()], dtype=torch.float64) / len(cut)
        flipped, values = flipped + agreement.flipped, values + agreement.values
    kernels, reference = logs.exp().tolist()
    difference = abs(kernels / reference - 1)
    return Check(
        model=label,
        promise="kernels and reference path agree to 0.1 % in perplexity",
        measured=f"{kernels:.4f} and {reference:.4f}, {difference:.0e} apart; {flipped} of "
        f"{values / 1e6:.1f} million codes on an edge went the other way",
        ok=difference < 1e-3,
    )


def promises(label: str, rows: dict[str, Row]) -> list[Check]:
    """What the method promises of a model's rows; three of them show on outliers only."""
    baseline, best = rows[BASELINE], rows[RESQ_GPTQ]
    found = [
        (
            "ResQ with GPTQ within 5 % of 16-bit",
            f"{best.increase:+.2%}",
            best.increase < 0.05,
        )
    ]
    if label == OUTLIERS:
        rtn, rotation = rows[RTN], rows[ROTATION]
        found += [
            (
                "plain rounding ruins the model (more than twice the perplexity)",
                f"{rtn.perplexity / baseline.perplexity:.1f} times",
                rtn.perplexity > 2 * baseline.perplexity,
            ),
            (
                "rotation only loses at least 1.5 times what ResQ with GPTQ loses",
                f"{rotation.increase:+.2%} against {best.increase:+.2%}",
                rotation.increase > 1.5 * best.increase,
            ),
        ]
    return [
        Check(model=label, promise=promise, measured=measured, ok=ok)
        for promise, measured, ok in found
    ]


def side_by_side(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, width: int = 31
) -> str:
    """Continuations of one prompt by the 16-bit model, plain rounding and ResQ, in columns.

    Greedy, with a penalty of 1.2 on repetition: a model of this size repeats itself otherwise.
    """
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    columns = []
    for name in (BASELINE, RTN, RESQ_GPTQ):
        done = models[name].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=0,
        )[0]
        text = tokenizer.decode(done, skip_special_tokens=True)
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]]
        columns.append([name, "-" * width, *lines])
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join("   ".join(cell.ljust(width) for cell in line).rstrip() for line in lines)


HEADER = ("", "perplexity", "above 16-bit", "KL, nats", "checkpoint", "linears")
HEADER += ("decode tok/s", "prefill tok/s")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    return (
        row.name,
        f"{row.perplexity:.3f}",
        "" if row.name == BASELINE else f"{row.increase:+.2%}",
        "" if row.name == BASELINE else f"{row.kl_to_baseline:.4f}",
        size(row.bytes_total),
        size(row.bytes_linears),
        f"{row.decode_tokens_per_second:.0f}",
        f"{row.prefill_tokens_per_second:.0f}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: command-line arguments; those of the process when None.

    Returns:
        0, or 1 when a promise does not hold.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo")
    parser.add_argument(
        "--quick", action="store_true", help="the model with outliers on a few windows, for tests"
    )
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = QUICK if args.quick else Settings()
    began = time.perf_counter()

    say("read the calibration text (documentation and sources that come with Python)")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = calibration_text(12 * settings.samples * settings.seqlen)
    calibration = windows(tokenizer, text, settings.samples, settings.seqlen)
    work = args.out / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say("plant outlier channels into a copy of the model, same function")
    planted_folder = work / "outliers-16-bit"
    planted = plant(args.model, planted_folder, calibration[:8])

    models, checks = [], []
    if not args.quick:
        results, found = compare(PLAIN, args.model, work / "plain", settings, calibration)
        models.append(results | {"outliers": None})
        checks += found
    results, found = compare(OUTLIERS, planted_folder, work / "outliers", settings, calibration)
    models.append(results | {"outliers": planted})
    checks += found
    results = {
        "settings": asdict(settings) | {"quick": args.quick, "prompt": PROMPT},
        "machine": machine() | {"cpu_isa": torch.ops.resq.cpu_isa()},
        "versions": {
            "resq_kernels": resq_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "strengths": asdict(STRENGTHS),
        "models": models,
        "checks": [asdict(check) for check in checks],
        "seconds": time.perf_counter() - began,
    }
    write_json(str(args.out / "results.json"), results)
    write_report(args.out / "report.html", json.loads((args.out / "results.json").read_text()))
    print(LEGEND + "\n")
    print(
        table([("ok" if c.ok else "FAILED", f"{c.model}: {c.promise}", c.measured) for c in checks])
    )
    last = Path(models[-1]["rows"][-1]["folder"])
    print(
        f"\n{results['seconds']:.0f} s; report: {args.out / 'report.html'}\n"
        f'try it: {Path(sys.executable).parent / "resq"} generate {last} --prompt "{PROMPT}"'
    )
    failed = [check for check in checks if not check.ok]
    for check in failed:
        print(f"demo: {check.model}: {check.promise}: {check.measured}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
