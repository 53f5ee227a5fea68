"""The main job, end to end, on a small Llama: calibrate, quantize, save, load, measure, talk.

Runs on any machine without a download, in about two minutes on two cores. Two models are compared:
the small Llama in this folder, and the same function with outlier channels planted as real large
models have them (outliers.py). Of each: the 16-bit model, plain 4-bit rounding, rotation only, and
ResQ with two ways to round weights.

    python examples/demo_small.py            # results under out/demo-small/
    python examples/demo_small.py --quick    # the model with outliers on a few windows, for tests

Exits with 1 when the figures are not what the method promises, and says which.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import demo_common as common
import torch
from demo_common import BASELINE, HERE, RESQ_GPTQ, ROTATION, RTN, Check, Row, Settings, load, say
from outliers import OutlierStrengths, outlier_report, plant_outliers, save_folder
from stdlib_corpus import calibration_text, heldout_text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from resq_kernels.ptq.calibrate import windows
from resq_kernels.texts import tokenize

PROMPT = "The with statement is used to"
SAMPLE_TOKENS = 56
PLAIN, OUTLIERS = "small Llama", "small Llama with planted outliers"
NOTE = (
    "Calibration and held-out text come from Python's own documentation and sources, held-out "
    "from files that the small Llama never saw. The model is so small that its speed says little "
    "about the kernels; resq bench measures real sizes."
)
FULL = Settings(
    samples=32, seqlen=512, windows=48, check_windows=8, check_seqlen=512, new_tokens=48, rounds=5
)
QUICK = Settings(
    samples=8, seqlen=256, windows=16, check_windows=2, check_seqlen=256, new_tokens=8, rounds=1
)
# Four channels of every norm 32 times larger: plain rounding then costs about as much as published
# for Llama-3 (perplexity of RTN over 16-bit: 36 for 8B, 34 for 3.2-1B and 3.2-3B; arXiv 2412.14363,
# Table 1). Methods that fold the norms into the weights undo this kind of outlier and face the
# others: concentrated residual directions, keys, values and MLP channels.
STRENGTHS = OutlierStrengths(norm_factor=32.0)


def plant(source: Path, out: Path, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Writes the same function with outlier channels; how far they stand out, before and after."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        before = outlier_report(model, ids[:4])
        plant_outliers(model, ids, STRENGTHS)
        after = outlier_report(model, ids[:4])
    save_folder(out, model.to(torch.bfloat16), AutoTokenizer.from_pretrained(source))
    return {name: {"before": before[name], "after": after[name]} for name in before}


def compare(
    label: str, source: Path, out: Path, settings: Settings, calibration: torch.Tensor
) -> tuple[dict[str, object], list[Check]]:
    """Quantizes a model in every way, measures all rows, and checks the promises.

    Returns:
        The model's entry in the results, and the checks.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    heldout = tokenize(tokenizer, heldout_text(8 * settings.windows * settings.seqlen))
    folders, reports = common.quantize_all(label, source, out, calibration, settings)
    models = {name: load(folder) for name, folder in folders.items()}
    rows = common.measure(label, models, folders, reports, heldout, settings)
    say(f"{label}: kernels against the reference path")
    agreement = common.reference_check(label, folders[RESQ_GPTQ], heldout, settings)
    checks = [*promises(label, {row.name: row for row in rows}), agreement]
    samples = continuations(models, tokenizer)
    common.show(label, rows, samples)
    return common.model_results(label, rows, samples, reports[RESQ_GPTQ]), checks


def promises(label: str, rows: Mapping[str, Row]) -> list[Check]:
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
    return common.checks(label, found)


def continuations(models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> str:
    """Continuations of one prompt by the 16-bit model, plain rounding and ResQ, in columns.

    Greedy, with a penalty of 1.2 on repetition: a model of this size repeats itself otherwise.
    """
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    texts = {}
    for name in (BASELINE, RTN, RESQ_GPTQ):
        done = models[name].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=0,
        )[0]
        texts[name] = tokenizer.decode(done, skip_special_tokens=True)
    return common.columns(texts)


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
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo-small")
    parser.add_argument(
        "--quick", action="store_true", help="the model with outliers on a few windows, for tests"
    )
    args = parser.parse_args(argv)
    common.quiet()
    settings = QUICK if args.quick else FULL

    say("read the calibration text (documentation and sources that come with Python)")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = calibration_text(12 * settings.samples * settings.seqlen)
    calibration = windows(tokenizer, text, settings.samples, settings.seqlen).calibration
    work = args.out / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say("plant outlier channels into a copy of the model, same function")
    planted_folder = work / "outliers-16-bit"
    planted = plant(args.model, planted_folder, calibration[:8])

    models, checks = [], []
    if not args.quick:
        results, found = compare(PLAIN, args.model, work / "plain", settings, calibration)
        models.append(results)
        checks += found
    results, found = compare(OUTLIERS, planted_folder, work / "outliers", settings, calibration)
    models.append(results | {"outliers": planted})
    checks += found
    facts = {"quick": args.quick, "prompt": PROMPT, "strengths": asdict(STRENGTHS)}
    code = common.finish(args.out, "ResQ on a small Llama", NOTE, settings, models, checks, facts)
    last = Path(models[-1]["rows"][-1]["folder"])
    print(f'try it: {Path(sys.executable).parent / "resq"} generate {last} --prompt "{PROMPT}"')
    return code


if __name__ == "__main__":
    sys.exit(main())
