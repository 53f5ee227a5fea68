"""The GPU run: values, races, captures and times on a GPU, one report.

    python3 tools/gpu_check.py --out DIR [--minutes N] [--only STEP... | --from STEP] [--dry]

Steps are data (tools/gpu/steps.py), in order of value. Each is a process group of its own with a
limit; one that fails, hangs or crashes costs its own time. DIR/report.json, report.md and
logs.tar.gz are rewritten after every step. --minutes takes the steps that fit. --dry runs every
step without a device (tools/gpu/dry_cuda.py).
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import runner  # noqa: E402
from gpu.report import Report, last_lines  # noqa: E402
from gpu.steps import STEPS, Step  # noqa: E402

DRY = ("tools/gpu/dry_cuda.py",)
DRY_MOST = {"--batch": 130, "--context": 130}  # still both kinds of every kernel
DRY_SLOWER = 5  # limits are for a GPU
LIBRARIES = ("resq_kernels/_C_cpu.so", "resq_kernels/_C_cuda.so")
REPORTING_SECONDS = 5.0  # kept of --minutes for the end
NAMES = [step.name for step in STEPS]


def command_of(step: Step, dry: bool) -> list[str]:
    """The command line; without a device, Python on the dry one, no tool around it, small sizes."""
    if not dry:
        return [*step.wrapper, sys.executable, *step.arguments]
    arguments = list(step.arguments)
    for option, most in DRY_MOST.items():
        if option in arguments:
            place = arguments.index(option) + 1
            numbers = [min(int(number), most) for number in arguments[place].split(",")]
            arguments[place] = ",".join(map(str, dict.fromkeys(numbers)))
    return [sys.executable, *DRY, *arguments]


def take(step: Step, dry: bool) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Runs a step: its entry of the report, its log, its files."""
    limit_s = step.limit_s * (DRY_SLOWER if dry else 1)
    result = runner.run(command_of(step, dry), step.environment, limit_s)
    log, files = result.pop("log"), result.pop("files")
    figures, faults = runner.figures(files)
    counted = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error).*?) in [\d.]+s", log, re.M)
    summary = counted[-1] if counted else ""
    if step.summary and not dry:
        found = re.findall(step.summary, log)
        summary = f"{found[-1]}; {summary}".rstrip("; ") if found else summary
        faults += [] if found else [f"output: expected {step.summary!r}, found none"]
    if "pytest" in step.arguments and " passed" not in summary:
        faults.append("tests: expected some that pass, got none")  # all skipped shows nothing
    if faults and result["status"] == "passed":
        result["status"] = "failed"
    entry = {
        "name": step.name,
        **result,
        "limit_s": limit_s,
        "decides": step.decides,
        "command": [*step.wrapper, "python3", *step.arguments],
        "environment": step.environment,
        "summary": "; ".join([summary, *faults]).strip("; "),
        "end": "" if result["status"] == "passed" else last_lines("\n".join([log, *faults])),
        "figures": figures,
    }
    return entry, log, files


def skipped(step: Step, reason: str) -> dict[str, Any]:
    """The entry of a step that did not run."""
    return {
        "name": step.name,
        "status": "skipped",
        "seconds": 0.0,
        "limit_s": step.limit_s,
        "decides": step.decides,
        "summary": reason,
    }


def commit() -> str:
    """The commit of the source: git's, or what the checkout's files say where there is no git."""
    command = ["git", "-C", str(runner.ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, Any]:
    """The GPU as nvidia-smi names it, with clocks, power and what throttles it."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": str(error)}
    if done.returncode != 0:
        return {"nvidia-smi": done.stdout.strip() or done.stderr.strip()}
    keys = ["gpu", *fields.split(",")[1:]]
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=False))


def chosen(arguments: argparse.Namespace) -> list[Step]:
    """The steps of --only or --from, in order of value."""
    if arguments.only:
        return [step for step in STEPS if step.name in arguments.only]
    first = NAMES.index(arguments.start) if arguments.start else 0
    return list(STEPS[first:])


def run_all(steps: list[Step], report: Report, minutes: float, dry: bool) -> None:
    """Runs the steps that fit, and says at once how each went."""
    end = time.monotonic() + minutes * 60 - REPORTING_SECONDS
    unusable = ""
    for step in steps:
        left = end - time.monotonic()
        if unusable or left < step.limit_s:
            why = unusable or "no time left; --only takes them"
            report.add(skipped(step, why), "", {})
            continue
        entry, log, files = take(step, dry)
        report.add(entry, log, files)
        print(f"{entry['name']}: {entry['status']} in {entry['seconds']} s", flush=True)
        if step.name == "info":
            cuda = (entry["figures"] or {}).get("cuda", {})
            if cuda.get("used") is False:
                unusable = f"no kernels of CUDA here: {cuda['why_not']}"


def main() -> int:
    """Runs the steps; returns the exit code: 0 if all that ran passed."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"steps, in order of value: {' '.join(NAMES)}",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the report")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="end within N minutes: a step is taken if its limit fits (default: all steps)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=NAMES, metavar="STEP", help="these steps")
    which.add_argument(
        "--from", dest="start", choices=NAMES, metavar="STEP", help="this step and those after it"
    )
    parser.add_argument("--dry", action="store_true", help="without a device, on tiny shapes")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {arguments.minutes:g}")
    missing = [name for name in LIBRARIES[: 1 if arguments.dry else 2]]
    missing = [name for name in missing if not (runner.ROOT / name).exists()]
    if missing:
        parser.error(
            f"expected {' and '.join(missing)}, found none; build here, or build elsewhere and "
            "copy: RESQ_CUDA=1 python3 setup.py build_ext --inplace"
        )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.json").touch()
    except OSError as error:
        parser.error(f"--out: expected a folder that can be written to, got {error}")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "dry": arguments.dry,
        "machine": machine(),
    }
    report = Report(arguments.out, facts)
    run_all(chosen(arguments), report, arguments.minutes, arguments.dry)
    report.set_fact("machine_after", machine())
    report.write()
    print(report.markdown())
    return 1 if any(s["status"] not in ("passed", "skipped") for s in report.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
