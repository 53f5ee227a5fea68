"""The main job, end to end, on a real model: get, quantize, save, load, measure, talk.

SmolLM2-135M-Instruct comes out of a Python package (smollm2.py), so that only the package index is
needed; where that cannot be reached, demo_small.py runs instead. Compared are the 16-bit model,
plain 4-bit rounding, rotation only, and ResQ with activations in 4 and in 8 bits, on text that
comes with Python. Then the 16-bit model and ResQ answer the same questions.

    python examples/demo.py                  # results under out/demo/
    python examples/demo.py --model FOLDER   # another instruct model

Exits with 1 when the figures are not what the method promises, and says which.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import demo_common as common
import demo_small
import smollm2
import torch
from demo_common import (
    BASELINE,
    HERE,
    RESQ_GPTQ,
    RESQ_WIDE,
    ROTATION,
    RTN,
    Check,
    Row,
    Settings,
    load,
    say,
)
from stdlib_corpus import calibration_text, heldout_text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from resq_kernels import ResQConfig, from_pretrained
from resq_kernels.commands.conversation import Conversation
from resq_kernels.ptq.calibrate import windows
from resq_kernels.ptq.dialogues import plan, write_dialogues
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.texts import tokenize

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that adds two numbers.",
)
ANSWER_TOKENS = 64
NOTE = (
    "Text: Python's own documentation and sources (WikiText-2 cannot be shipped), {windows} "
    "windows of {seqlen} held-out tokens; calibration on {samples} windows from other files and of "
    "dialogues that the model wrote. "
    "Single greedy answers of so small a model change with any rounding: the divergence tells "
    "more. `resq eval` measures on your text."
)
FULL = Settings(
    samples=8, seqlen=512, windows=8, check_windows=2, check_seqlen=128, new_tokens=32, rounds=3
)


def baseline_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it; elsewhere float32, which is faster there."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    native = any(f" {flag} " in flags.replace("\n", " ") for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def promises(label: str, rows: Mapping[str, Row]) -> list[Check]:
    """What the demo's text and README say of the rows."""
    baseline, rtn, rotation, best = (rows[n] for n in (BASELINE, RTN, ROTATION, RESQ_GPTQ))
    wide = rows[RESQ_WIDE]
    kl = [row.kl_to_baseline for row in (best, rotation, rtn)]
    whole = best.bytes_total / baseline.bytes_total
    linears = best.bytes_linears / baseline.bytes_linears
    found = [
        (
            "divergence from 16-bit: ResQ below rotation only below plain rounding",
            " < ".join(f"{value:.4f}" for value in kl),
            kl[0] < kl[1] < kl[2],
        ),
        (
            "agreement with 16-bit: ResQ above rotation only above plain rounding",
            " > ".join(f"{row.top1_agreement:.1%}" for row in (best, rotation, rtn)),
            best.top1_agreement > rotation.top1_agreement > rtn.top1_agreement,
        ),
        (
            "activations in 8 bits take at least a third of the divergence of ResQ",
            f"{best.kl_to_baseline:.4f} to {wide.kl_to_baseline:.4f}",
            wide.kl_to_baseline < 2 / 3 * best.kl_to_baseline,
        ),
        (
            "plain rounding ruins the model (more than twice the perplexity)",
            f"{rtn.perplexity / baseline.perplexity:.1f} times",
            rtn.perplexity > 2 * baseline.perplexity,
        ),
        (
            "ResQ's checkpoint takes at most 40 % of the bytes, its linears 30 %",
            f"{whole:.1%} and {linears:.1%}",
            whole <= 0.4 and linears <= 0.3,
        ),
    ]
    return common.checks(label, found)


def answers(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> str:
    """Every question with the answers of the 16-bit model and of ResQ, in columns; greedy."""
    parts = []
    names = (BASELINE, RESQ_WIDE, RESQ_GPTQ)
    talks = {name: Conversation(models[name], tokenizer) for name in names}
    for question in QUESTIONS:
        texts = {}
        for name, talk in talks.items():
            talk.reset()
            turn = talk.reply(question, ANSWER_TOKENS)
            texts[name] = turn.assistant + (" [...]" if turn.end == "limit" else "")
        parts.append(f"> {question}\n\n{textwrap.indent(common.columns(texts), '  ')}")
    return "\n\n".join(parts)


def calibration_windows(
    source: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> torch.Tensor:
    """Windows of text, and those that the model writes itself, as in `resq quantize`."""
    model = SourceModel(source)
    config = ResQConfig(samples=settings.samples, seqlen=settings.seqlen)
    config, dialogues = plan(config, tokenizer, model.shape, model.dtype, "cpu")
    count, seqlen = config.text_samples, config.seqlen
    text = calibration_text(12 * count * seqlen)
    found = [windows(tokenizer, text, count, seqlen).calibration]
    if dialogues is not None:
        say(f"the model writes {dialogues.calibration} of {settings.samples} calibration windows")
        with tempfile.TemporaryDirectory(prefix="resq-") as folder:
            written, _ = write_dialogues(model, dialogues, config.seed, Workspace(Path(folder)))
        found.append(written)
    return torch.cat(found)


def run(label: str, source: Path, out: Path, settings: Settings) -> int:
    """Quantizes the model of a folder, measures, checks, reports; returns the exit code."""
    say("read the calibration text (documentation and sources that come with Python)")
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration = calibration_windows(source, tokenizer, settings)
    heldout = tokenize(tokenizer, heldout_text(12 * settings.windows * settings.seqlen))
    folders, reports = common.quantize_all(
        label, source, out / "models", calibration, settings, (RTN, ROTATION, RESQ_GPTQ)
    )
    models = {name: load(folder) for name, folder in folders.items() if name != BASELINE}
    models = {BASELINE: load(source, baseline_dtype()), **models}
    models[RESQ_WIDE] = from_pretrained(folders[RESQ_GPTQ], lo_bits=8).eval()
    folders[RESQ_WIDE] = folders[RESQ_GPTQ]
    reports[RESQ_WIDE] = {**reports[RESQ_GPTQ], "layers": []}  # those of the row above
    rows = common.measure(label, models, folders, reports, heldout, settings)
    say(f"{label}: kernels against the reference path")
    agreement = common.reference_check(label, folders[RESQ_GPTQ], heldout, settings)
    checks = [*promises(label, {row.name: row for row in rows}), agreement]
    say(f"{label}: {len(QUESTIONS)} questions")
    samples = answers(models, tokenizer)
    common.show(label, rows, samples)
    model = common.model_results(label, rows, samples, reports[RESQ_GPTQ])
    note = NOTE.format(**asdict(settings))
    facts = {"questions": QUESTIONS}
    code = common.finish(out, f"ResQ on {label}", note, settings, [model], checks, facts)
    program = Path(sys.executable).parent / "resq"
    print(f"talk to it: {program} chat {folders[RESQ_GPTQ]} --lo-bits 8")
    return code


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
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder with a chat template, instead of SmolLM2"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo")
    parser.add_argument("--samples", type=int, default=FULL.samples, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=FULL.seqlen, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=FULL.windows, help="held-out windows")
    args = parser.parse_args(argv)
    common.quiet()
    settings = replace(FULL, samples=args.samples, seqlen=args.seqlen, windows=args.windows)
    shutil.rmtree(args.out / "models", ignore_errors=True)
    if args.model is not None:
        return run(args.model.name, args.model, args.out, settings)
    say(f"get {smollm2.NAME} ({smollm2.PACKAGE} of the package index) and convert it")
    try:
        source = smollm2.model_folder(HERE.parent / "out" / "download", args.out / smollm2.NAME)
    except smollm2.Unavailable as error:
        print(f"{smollm2.NAME} cannot be had ({error}); the small Llama of examples/ instead")
        return demo_small.main(["--out", str(args.out)])
    return run(smollm2.NAME, source, args.out, settings)


if __name__ == "__main__":
    sys.exit(main())
