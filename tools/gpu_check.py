"""Acceptance on a machine with a GPU: tests, compute-sanitizer, every benchmark, one report.

Uses the libraries in resq_kernels/ if they are there and builds them otherwise. Every step has a
limit, in all under fifteen minutes; --only splits that. Writes NAME.json, NAME.md and the plots of
the benchmarks; the exit code is 0 only if every step passed.

    python tools/gpu_check.py [--out benchmarks/results] [--only tests memcheck]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Options of `resq bench` in addition to --device, --shapes and --out.
BENCHMARKS = {
    "gemm": ["--batch", "1,16,64,128,256,2048"],
    "quantize": ["--batch", "1,16,256,2048"],
    "hadamard": ["--batch", "1,16,256,2048"],
    "attention": ["--batch", "1,8,64", "--context", "1024,8192,32768"],
    "prefill": ["--batch", "1,8", "--context", "2048,16384"],
    "layer": ["--batch", "1,8", "--context", "2048"],
    "model": ["--batch", "1,8", "--context", "1024", "--layers", "4"],
}
LIMIT_SECONDS = {"tests": 200, "memcheck": 75, "racecheck": 75}
LIMIT_SECONDS |= {"gemm": 100, "quantize": 40, "hadamard": 30, "attention": 60, "prefill": 60}
LIMIT_SECONDS |= {"layer": 90, "model": 120}
STEPS = tuple(LIMIT_SECONDS)
TAIL = 20000  # characters of a step's output that the report keeps: all rows of a benchmark
Result = dict[str, object]


def run(name: str, command: list[str], environment: dict[str, str] | None = None) -> Result:
    """Runs one step within its limit; never raises."""
    start = time.monotonic()
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS.get(name),
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code = None
        output = (stopped.stdout or b"").decode(errors="replace")
        output += f"\nstopped after {LIMIT_SECONDS[name]} s"
    except OSError as error:
        code, output = None, str(error)
    seconds = round(time.monotonic() - start, 1)
    return {"passed": code == 0, "exit_code": code, "seconds": seconds, "output": output[-TAIL:]}


def build() -> Result:
    """Nothing where both libraries are built, else setup.py."""
    libraries = [ROOT / f"resq_kernels/_C_{name}.so" for name in ("cpu", "cuda")]
    if all(library.exists() for library in libraries):
        return {"passed": True, "seconds": 0, "output": "prebuilt libraries"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return run("build", command, {"RESQ_CUDA": "1"})


def tests(folder: Path) -> Result:
    """The GPU suite, with the numbers of its tests."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-x", f"--junitxml={report}"]
    result = run("tests", command)
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        names = ("tests", "failures", "errors", "skipped")
        result |= {name: int(suite.get(name, 0)) for name in names}
        # A suite that skips everything has shown nothing.
        result["passed"] &= result["tests"] > result["skipped"]
    return result


def sanitizer(tool: str) -> Result:
    """compute-sanitizer over the small tests."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    pytest = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-x", "-m", "sanitizer"]
    command = [program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
    # The caching allocator would hide overruns inside its blocks.
    result = run(tool, command + pytest, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", str(result["output"]))
    result["summary"] = found[-1] if found else None
    result["passed"] &= bool(found)
    return result


def benchmark_command(name: str, models: str, prefix: Path) -> list[str]:
    """The arguments of `resq` for one benchmark."""
    options = [*BENCHMARKS[name], "--device", "cuda", "--shapes", models]
    return ["bench", name, *options, "--out", str(prefix)]


def benchmark(name: str, folder: Path, models: str) -> Result:
    """One benchmark; its figures become the report's, `prefix` is where its other files are."""
    prefix = folder / name
    for old in folder.glob(f"{name}.*"):
        old.unlink()
    arguments = benchmark_command(name, models, prefix.relative_to(ROOT))  # run() starts there
    result = run(name, [sys.executable, "-m", "resq_kernels", *arguments])
    if result["passed"]:
        result |= {"figures": json.loads(prefix.with_suffix(".json").read_text())}
    return result


def commit() -> str:
    """The commit of the source, or "unknown" where git does not know."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def markdown(report: dict, tables: dict[str, str]) -> str:
    """The report for readers; `tables` are those of the benchmarks."""
    lines = [f"# GPU check, {report['date']}, commit {report['commit']}", ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    for name, step in report["steps"].items():
        counts = ", ".join(
            f"{step[key]} {key}" for key in ("tests", "failures", "skipped") if key in step
        )
        result = ("passed" if step["passed"] else "FAILED") + (f" ({counts})" if counts else "")
        lines.append(f"| {name} | {result} {step.get('summary') or ''} | {step['seconds']} |")
    for name, text in tables.items():
        lines += ["", f"## resq bench {name}", "", text]
    for name, step in report["steps"].items():
        if not step["passed"]:
            lines += ["", f"## {name}: end of its output", "", "```", str(step["output"]), "```"]
    return "\n".join(lines) + "\n"


def take(name: str, scratch: Path, models: str) -> Result:
    """Runs one of STEPS."""
    if name == "tests":
        return tests(scratch)
    return benchmark(name, scratch, models) if name in BENCHMARKS else sanitizer(name)


def report_name(report: dict, steps: Sequence[str]) -> str:
    """DATE_gpu-check_GPU, with the steps where these are not all."""
    found = [step["figures"]["machine"] for step in report["steps"].values() if "figures" in step]
    gpu = found[0].get("gpu", {}).get("gpu", "gpu") if found else "gpu"
    kind = "gpu-check" if tuple(steps) == STEPS else "-".join(["gpu", *steps])
    return f"{report['date']}_{kind}_{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"


def main() -> int:
    """Runs the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--only", nargs="+", default=STEPS, choices=STEPS, help="these steps")
    parser.add_argument("--models", default="llama-3-8b", help="of the benchmarks, with commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = ROOT / "out/gpu-check"
    scratch.mkdir(parents=True, exist_ok=True)
    report = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "steps": {"build": build()}}
    if report["steps"]["build"]["passed"]:
        for name in arguments.only:
            step = report["steps"][name] = take(name, scratch, arguments.models)
            result = "passed" if step["passed"] else "FAILED"
            print(f"{name}: {result} in {step['seconds']} s", flush=True)
    name = report_name(report, arguments.only)
    measured = [step for step, result in report["steps"].items() if "figures" in result]
    tables = {step: (scratch / f"{step}.md").read_text() for step in measured}
    contents = {"json": json.dumps(report, indent=1), "md": markdown(report, tables)}
    for suffix, text in contents.items():
        partial = arguments.out / f"{name}.{suffix}.partial"
        partial.write_text(text)
        partial.replace(arguments.out / f"{name}.{suffix}")
    for step in measured:
        plot = scratch / f"{step}.png"
        if plot.exists():  # not where matplotlib is missing
            shutil.copyfile(plot, arguments.out / f"{name}_{step}.png")
    print(f"report: {arguments.out / name}.md")
    return 0 if all(step["passed"] for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
