"""What the demos share: quantize a model in several ways, measure every row, check, report.

Every quantized row goes through a saved Hugging Face folder and the real kernels, on the same
text, in the same run as the 16-bit one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# The matrices are so small that threads which spin while they wait cost more than the work where
# other programs use the cores too: one quantization took 88 s instead of 26 s at a load of 7.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from demo_report import above, render
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import resq_kernels
from resq_kernels import ResQConfig, evaluate
from resq_kernels.commands.info import machine
from resq_kernels.commands.output import size, table, write_json
from resq_kernels.commands.sizes import part_sizes
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.safetensors_io import write_bytes
from resq_kernels.testing.lockstep import lockstep

HERE = Path(__file__).resolve().parent

BASELINE = "16-bit"
RTN, ROTATION, RESQ_RTN, RESQ_GPTQ = "RTN", "rotation only", "ResQ, RTN", "ResQ, GPTQ"
RESQ_WIDE = "ResQ, 8-bit activations"
VARIANTS: dict[str, dict[str, str]] = {
    RTN: {"method": "rtn", "weights": "rtn"},
    ROTATION: {"method": "quarot", "weights": "gptq"},
    RESQ_RTN: {"method": "resq", "weights": "rtn"},
    RESQ_GPTQ: {"method": "resq", "weights": "gptq"},
}
LEGEND = """\
All quantized rows: weights, activations and KV cache in 4 bits (ResQ keeps 1/8 of every dimension
in 8). RTN: round to nearest. Rotation only: random Hadamard rotation, GPTQ weights (as QuaRot).
ResQ: PCA bases and rotations, weights by RTN or GPTQ. 8-bit activations: the folder of ResQ, GPTQ,
loaded with lo_bits=8, which costs nothing on a CPU. KL: mean divergence from the 16-bit model,
which tells more than the perplexity of one text. Top-1: how often both find the same token
likeliest. Linears: bytes of the decoder's linear layers, scales included."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        samples, seqlen: calibration windows and the tokens of a window.
        windows: evaluation windows of `seqlen` tokens.
        check_windows, check_seqlen: windows on which the kernels are compared with the reference
            path (resq_kernels.testing.lockstep), and their tokens.
        new_tokens, rounds: tokens of a timed generation, and how often it is timed.
    """

    samples: int
    seqlen: int
    windows: int
    check_windows: int
    check_seqlen: int
    new_tokens: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a model's table.

    Attributes:
        name: "16-bit", a key of VARIANTS, or RESQ_WIDE.
        folder: where the model lies.
        dtype: of what is not quantized.
        perplexity, increase: on the held-out text; share above the 16-bit row's.
        kl_to_baseline: mean KL(16-bit || row) over the same targets, in nats.
        top1_agreement: share of them whose likeliest token is that of the 16-bit model.
        bytes_total, bytes_linears: of the checkpoint; of the decoder's linears with their scales.
        decode_tokens_per_second: greedy generation, batch 1, median of the rounds.
        prefill_tokens_per_second: one window at once, mean of the windows of the evaluation.
        quantize_seconds: calibration included; None for the 16-bit row.
        layers: name and relative output error of every quantized linear.
    """

    name: str
    folder: str
    dtype: str
    perplexity: float
    increase: float
    kl_to_baseline: float
    top1_agreement: float
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


def checks(label: str, found: Sequence[tuple[str, str, bool]]) -> list[Check]:
    """Promises of a model, what was measured, and whether they hold."""
    return [
        Check(model=label, promise=promise, measured=measured, ok=ok)
        for promise, measured, ok in found
    ]


def say(text: str) -> None:
    """A line of progress on stdout, with the seconds since the start."""
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


START = time.perf_counter()


def quiet() -> None:
    """Bars and warnings are ours."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load(folder: Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The model of a folder, 16-bit or quantized, the way a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def quantize_all(
    label: str,
    source: Path,
    out: Path,
    calibration: torch.Tensor,
    settings: Settings,
    names: Sequence[str] = tuple(VARIANTS),
) -> tuple[dict[str, Path], dict[str, dict]]:
    """Quantizes a model in several ways.

    Returns:
        The folders by the names of rows, the source first, and the reports of the others.
    """
    out.mkdir(parents=True)
    folders, reports = {BASELINE: source}, {}
    for name in names:
        say(f"{label}: quantize, {name}")
        folders[name] = out / name.lower().replace(", ", "-").replace(" ", "-")
        # Nothing of plain rounding depends on the text; one window is for the errors in its report.
        tokens = calibration[:1] if name == RTN else calibration
        config = ResQConfig(samples=len(tokens), seqlen=settings.seqlen, **VARIANTS[name])
        reports[name] = quantize_folder(source, folders[name], tokens, config)
    return folders, reports


def measure(
    label: str,
    models: Mapping[str, PreTrainedModel],
    folders: Mapping[str, Path],
    reports: Mapping[str, Mapping],
    heldout: torch.Tensor,
    settings: Settings,
) -> list[Row]:
    """All rows of a model: quality on the held-out text, sizes, speed. The first is the 16-bit."""
    say(f"{label}: perplexity and divergence on the held-out text")
    windows = evaluate.cut_windows(heldout, settings.seqlen, settings.windows)
    measured = evaluate.measure(models, windows, progress="perplexity")
    say(f"{label}: speed of generation")
    speed = decode_speeds(models, heldout, settings)
    rows = []
    for name, model in models.items():
        parts = part_sizes(folders[name])
        found = measured[name]
        rows.append(
            Row(
                name=name,
                folder=str(folders[name]),
                dtype=str(model.dtype).removeprefix("torch."),
                perplexity=found.perplexity,
                increase=found.perplexity / measured[BASELINE].perplexity - 1,
                kl_to_baseline=found.kl,
                top1_agreement=found.top1,
                bytes_total=parts["total"],
                bytes_linears=parts["linears"] + parts["linear_scales"],
                decode_tokens_per_second=speed[name],
                prefill_tokens_per_second=windows.numel() / found.seconds,
                quantize_seconds=reports[name]["seconds"] if name in reports else None,
                layers=reports[name]["layers"] if name in reports else [],
            )
        )
    return rows


def decode_speeds(
    models: Mapping[str, PreTrainedModel], tokens: torch.Tensor, settings: Settings
) -> dict[str, float]:
    """Tokens/s of greedy generation of each model: medians of rounds in which all take turns.

    All decode by `generate`, which prepares the steps of quantized models.
    """
    prompt = tokens[None, :32]
    times: dict[str, list[float]] = {name: [] for name in models}
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for turn in tqdm(range(settings.rounds + 1), desc="speed", delay=2, leave=False):
        for name, model in models.items():
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=settings.new_tokens,
                    **options,
                )
            if turn:  # the first round warms up
                times[name].append(settings.new_tokens / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def reference_check(label: str, folder: Path, heldout: torch.Tensor, settings: Settings) -> Check:
    """Perplexity through the kernels against the plain torch path along the same codes.

    In float32 outside the kernels, so that a disagreement is theirs and not bfloat16's.
    """
    model, seqlen = load(folder, torch.float32), settings.check_seqlen
    logs, flipped, values = torch.zeros(2, dtype=torch.float64), 0, 0
    cut = heldout[: settings.check_windows * seqlen].split(seqlen)
    for window in tqdm(cut, desc="reference", unit="window", delay=2, leave=False):

        def run(window: torch.Tensor = window) -> float:
            return math.log(evaluate.perplexity(model, window, seqlen=seqlen).perplexity)

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


def columns(texts: Mapping[str, str], width: int = 31) -> str:
    """Texts side by side under their names."""
    found = []
    for name, text in texts.items():
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]]
        found.append([name, "-" * width, *lines])
    lines = itertools.zip_longest(*found, fillvalue="")
    return "\n".join("   ".join(cell.ljust(width) for cell in line).rstrip() for line in lines)


HEADER = ("", "perplexity", "above 16-bit", "KL, nats", "top-1", "checkpoint", "linears")
HEADER += ("decode tok/s", "prefill tok/s")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    baseline = row.name == BASELINE
    return (
        f"{row.name}, run in {row.dtype}" if baseline else row.name,
        f"{row.perplexity:.3f}",
        "" if baseline else above(row.increase),
        "" if baseline else f"{row.kl_to_baseline:.4f}",
        "" if baseline else f"{row.top1_agreement:.1%}",
        size(row.bytes_total),
        size(row.bytes_linears),
        f"{row.decode_tokens_per_second:.0f}",
        f"{row.prefill_tokens_per_second:.0f}",
    )


def show(label: str, rows: Sequence[Row], samples: str) -> None:
    """Prints a model's table and texts."""
    print(f"\n{label}\n\n{table([cells(row) for row in rows], HEADER)}\n", flush=True)
    print(textwrap.indent(samples, "  ") + "\n", flush=True)


def model_results(
    label: str, rows: Sequence[Row], samples: str, report: Mapping[str, object]
) -> dict[str, object]:
    """A model's entry in results.json; `report` is that of the row whose bases are shown."""
    return {
        "name": label,
        "rows": [asdict(row) for row in rows],
        "samples": samples,
        "spectra": report["spectra"],
        "outliers": None,
    }


def finish(
    out: Path,
    title: str,
    note: str,
    settings: Settings,
    models: Sequence[Mapping],
    checks: Sequence[Check],
    facts: Mapping[str, object],
) -> int:
    """Writes results.json and report.html, prints the checks.

    Args:
        out: the folder of both files.
        title, note: of the report; what to know about its figures.
        settings: how much was measured.
        models: of `model_results`; planted outliers before and after, where there are any.
        checks: what was promised of them.
        facts: more keys of results.json.

    Returns:
        0, or 1 when a promise does not hold.
    """
    results = {
        "title": title,
        "note": note,
        "settings": asdict(settings),
        "machine": machine() | {"cpu_isa": torch.ops.resq.cpu_isa()},
        "versions": {
            "resq_kernels": resq_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "models": list(models),
        "checks": [asdict(check) for check in checks],
        "seconds": time.perf_counter() - START,
        **facts,
    }
    write_json(str(out / "results.json"), results)
    page = render(json.loads((out / "results.json").read_text()))
    write_bytes(out / "report.html", page.encode())
    print(f"{LEGEND}\n{textwrap.fill(note, 100)}\n")
    print(
        table([("ok" if c.ok else "FAILED", f"{c.model}: {c.promise}", c.measured) for c in checks])
    )
    print(f"\n{results['seconds']:.0f} s; report: {out / 'report.html'}")
    failed = [check for check in checks if not check.ok]
    for check in failed:
        print(f"demo: {check.model}: {check.promise}: {check.measured}", file=sys.stderr)
    return 1 if failed else 0
