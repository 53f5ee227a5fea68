"""Writes docs/gpu-status.md from the reports of GPU runs that are committed.

    python tools/gpu_status.py             # compare, exit code 1 if the page is another
    python tools/gpu_status.py --write

A report is benchmarks/results/*gpu-run*/report.json, as `tools/gpu_check.py --out` writes it; their
names, which begin with a date, say in which order they were made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/gpu-status.md"
REPORTS = "benchmarks/results/*gpu-run*/report.json"
ALL, SM80, SM90 = ("sm80", "sm90", "portable"), ("sm80",), ("sm90",)
EVERY = "80, 86, 89, 90, PTX"


def values(op: str) -> tuple[str, ...]:
    """The steps that show that an operator is right."""
    return f"first-{op}", f"values-{op}"


# (what, compiled for, families that run it, steps that must have passed)
ROWS = (
    ("mixed_gemm small_m", EVERY, ALL, values("mixed_gemm")),
    ("mixed_gemm sm80", "80, 86, 89", SM80, values("mixed_gemm")),
    ("mixed_gemm sm90", "90a", SM90, values("mixed_gemm")),
    ("pack_weight, unpack_weight", EVERY, ALL, values("pack_weight")),
    ("embedding", EVERY, ALL, values("embedding")),
    ("mixed_quantize", EVERY, ALL, values("mixed_quantize")),
    ("rms_norm_quantize", EVERY, ALL, values("rms_norm_quantize")),
    ("rms_norm", EVERY, ALL, values("rms_norm")),
    ("hadamard", EVERY, ALL, values("hadamard")),
    ("silu_mul_hadamard_quantize", EVERY, ALL, values("silu_mul_hadamard_quantize")),
    ("kv_append", EVERY, ALL, values("kv_append")),
    ("kv_attention", EVERY, ("sm80", "portable"), values("kv_attention")),
    ("kv_attention sm90 (bulk copies)", "90a", SM90, values("kv_attention")),
    ("kv_dequantize", EVERY, ALL, values("kv_dequantize")),
    ("search_scale", EVERY, ALL, values("search_scale")),
    ("gptq_block", EVERY, ALL, values("gptq_block")),
    ("prefill through float16", "torch", ALL, values("prefill")),
    ("dependent launches under delay, threads", "90, 90a", SM90, ("replays",)),
    ("operators in CUDA graphs, on two streams", EVERY, ALL, ("capture",)),
    ("models, DecodeGraph", EVERY, ALL, ("model-values",)),
    ("memory (compute-sanitizer memcheck)", EVERY, ALL, ("memcheck",)),
    ("shared memory (compute-sanitizer racecheck)", EVERY, ALL, ("racecheck",)),
    ("torch.compile, opcheck", EVERY, ALL, ("compile",)),
    ("`resq bench layer`, `resq bench model`", EVERY, ALL, ("layer", "model-1b")),
    ("benchmarks/cuda/int8_ceiling.cu (a measurement, not shipped)", "90a", SM90, ("peaks",)),
)
HEAD = """# GPU status

What has run on which GPU, at which commit, by `tools/gpu_check.py` (docs/notes/0018);
`python tools/gpu_status.py --write` makes this page from the committed reports. {lead}
All kernels run under an emulator in the tests (docs/cuda.md), which finds wrong results, races and
bad addresses, and says nothing about speed.

| what | compiled for | last run on |
|---|---|---|
"""


def family(report: dict[str, Any]) -> str | None:
    """The family of kernels that ran, as the step `info` found it."""
    info = next((step for step in report["steps"] if step["name"] == "info"), {})
    devices = ((info.get("figures") or {}).get("cuda") or {}).get("devices") or [{}]
    return devices[0].get("kernels")


def joined(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports of one card, day and commit as one, the latest first; the last run of a step counts.

    Args:
        reports: from the earliest to the latest.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for report in reports:
        if report.get("dry") or not report.get("steps"):
            continue
        facts = (report["date"], report["machine"].get("gpu"), report["commit"], family(report))
        kept = found.setdefault(tuple(map(str, facts)), report | {"steps": []})
        ran = {step["name"] for step in report["steps"] if step["status"] != "skipped"}
        kept["steps"] = [step for step in kept["steps"] if step["name"] not in ran]
        kept["steps"] += [step for step in report["steps"] if step["name"] in ran]
    return sorted(found.values(), key=lambda report: report["date"])[::-1]


def outcome(report: dict[str, Any], families: tuple[str, ...], steps: tuple[str, ...]) -> str:
    """What a report says about a row; "" if it says nothing."""
    found = {s["name"]: s["status"] for s in report["steps"] if s["name"] in steps}
    ran = {name: status for name, status in found.items() if status != "skipped"}
    if family(report) not in families or not ran:
        return ""
    gpu = report["machine"].get("gpu", "an unnamed GPU")
    where = f"{gpu}, {report['date']}, commit {report['commit']}"
    bad = [f"{name} {status}" for name, status in ran.items() if status != "passed"]
    if bad:
        return f"**{', '.join(bad)}**: {where}"
    missing = [name for name in steps if name not in ran]
    return f"passed: {where}" + (f" (without {', '.join(missing)})" if missing else "")


def page(reports: list[dict[str, Any]]) -> str:
    """The page; of several runs the latest that says something about a row counts.

    Args:
        reports: from the earliest to the latest.
    """
    newest = joined(reports)
    lines = []
    for what, compiled, families, steps in ROWS:
        said = (outcome(report, families, steps) for report in newest)
        lines.append(f"| {what} | {compiled} | {next(filter(None, said), 'never run')} |")
    ran = any("never run" not in line for line in lines)
    lead = "" if ran else "**No kernel has run on a GPU yet.**"
    return HEAD.format(lead=lead).replace(". \n", ".\n") + "\n".join(lines) + "\n"


def main() -> int:
    """Writes or compares the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the page")
    arguments = parser.parse_args()
    text = page([json.loads(path.read_text()) for path in sorted(ROOT.glob(REPORTS))])
    if arguments.write:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        print(f"{PAGE.relative_to(ROOT)} is not what the reports say: run this with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
