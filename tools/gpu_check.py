"""The GPU run: values, races, captures and times on a GPU, one report.

    python3 tools/gpu_check.py --out DIR [--minutes N] [--only STEP... | --from STEP] [--dry]

RESQ_COMMIT names the commit where there is no git.

Steps are data (tools/gpu/steps.py), in order of value. Each is a process group of its own with a
limit; one that fails, hangs or crashes costs its own time. DIR/report.json, report.md and
logs.tar.gz are rewritten after every step. --minutes takes the steps that fit. --dry runs every
step without a device (tools/gpu/dry_cuda.py).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu import runner  # noqa: E402
from gpu.report import Report, last_lines, say  # noqa: E402
from gpu.steps import STEPS, Step  # noqa: E402

DRY = ("tools/gpu/dry_cuda.py",)
DRY_MOST = {"--batch": 130, "--context": 130}  # still both kinds of every kernel
DRY_SLOWER = 5  # limits are for a GPU
LIBRARIES = ("resq_kernels/_C_cpu.so", "resq_kernels/_C_cuda.so")
SETTINGS = ("RESQ_", "CUDA_", "PYTORCH_", "NVIDIA_", "TORCH")  # variables that change a run
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
    environment = step.environment | {"RESQ_COMMIT": commit()}
    result = runner.run(command_of(step, dry), environment, limit_s)
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
    if "{out}" in step.arguments and "result.json" not in files and result["status"] == "passed":
        faults.append("figures: expected a result, got none or one that is too large")
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


@functools.cache
def commit() -> str:
    """The commit of the source: RESQ_COMMIT, for a machine without git, or git's."""
    if given := os.environ.get("RESQ_COMMIT"):
        return given
    command = ["git", "-C", str(runner.ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def libraries() -> dict[str, str]:
    """Library -> SHA-256: what ran, whatever the commit says."""
    found = {}
    for name in LIBRARIES:
        path = runner.ROOT / name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"
    return found


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
    """The steps of --only or --from, in order of value, after the one that says what the GPU is."""
    names = arguments.only or NAMES[NAMES.index(arguments.start) if arguments.start else 0 :]
    return [step for step in STEPS if step is STEPS[0] or step.name in names]


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
        say(f"{step.name} ...")
        try:
            entry, log, files = take(step, dry)
        except Exception:  # a fault of the runner costs one step too
            log, files = traceback.format_exc(), {}
            entry = skipped(step, "") | {"status": "failed", "end": last_lines(log)}
        report.add(entry, log, files)
        say(f"{entry['name']}: {entry['status']} in {entry['seconds']} s {entry['summary']}")
        if step.name == "info":
            unusable = why_unusable(entry)


def why_unusable(info: dict[str, Any]) -> str:
    """Why nothing else is tried, from the entry of the step `info`; "" if there is no reason."""
    cuda = (info.get("figures") or {}).get("cuda", {})
    if cuda.get("used") is False:
        return f"no kernels of CUDA here: {cuda.get('why_not')}"
    # One that took too long may have read torch from a cold disk.
    return "" if info["status"] in ("passed", "timeout") else "`resq info` does not run here"


def end_on(number: int, _: Any) -> None:
    """A signal that ends the run ends its step too: the runner kills it on the way out."""
    raise SystemExit(128 + number)


def main() -> int:
    """Runs the steps; returns the exit code: 0 if some ran and all that ran passed."""
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
    needed = LIBRARIES[:1] if arguments.dry else LIBRARIES
    missing = [name for name in needed if not (runner.ROOT / name).exists()]
    if missing:
        parser.error(
            f"expected {' and '.join(missing)}, found none; build here, or build elsewhere and "
            "copy: RESQ_CUDA=1 python3 setup.py build_ext --inplace"
        )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.json").open("x").close()
    except FileExistsError as error:
        parser.error(f"--out: expected a folder without a report, got {error.filename}")
    except OSError as error:
        parser.error(f"--out: expected a folder that can be written to, got {error}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, end_on)
    runner.kill_left_over()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "dry": arguments.dry,
        "machine": machine(),
        "libraries": libraries(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }
    report = Report(arguments.out, facts)
    report.write()
    run_all(chosen(arguments), report, arguments.minutes, arguments.dry)
    report.set_fact("machine_after", machine())
    report.write()
    say(report.markdown())
    ran = [step["status"] for step in report.steps[1:] if step["status"] != "skipped"]
    return 0 if report.steps[0]["status"] == "passed" and set(ran) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
