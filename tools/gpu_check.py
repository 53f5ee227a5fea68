"""Acceptance on a machine with a GPU: tests, compute-sanitizer, a first benchmark, one report.

Uses the libraries in resq_kernels/ if they are there and builds them otherwise. Takes under eight
minutes. Writes NAME.json and NAME.md; the exit code is 0 only if every step passed.

    python tools/gpu_check.py [--out benchmarks/results] [--skip benchmark]
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "memcheck", "racecheck", "benchmark")
LIMIT_SECONDS = {"tests": 200, "memcheck": 75, "racecheck": 75, "benchmark": 100}
TAIL = 4000  # characters of a step's output that the report keeps
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


def benchmark(folder: Path, models: str) -> Result:
    """The first benchmark; its figures become the report's."""
    target = folder / "benchmark.json"
    command = [sys.executable, "-m", "resq_kernels.testing.bench_cuda", "--models", models]
    command += ["--ceiling", "benchmarks/cuda/int8_ceiling.cu", "--json", str(target)]
    result = run("benchmark", command)
    if target.exists():
        result["figures"] = json.loads(target.read_text())
    return result


def commit() -> str:
    """The commit of the source, or "unknown" where git does not know."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def markdown(report: dict) -> str:
    """The report for readers."""
    lines = [f"# GPU check, {report['date']}, commit {report['commit']}", ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    for name, step in report["steps"].items():
        counts = ", ".join(
            f"{step[key]} {key}" for key in ("tests", "failures", "skipped") if key in step
        )
        result = ("passed" if step["passed"] else "FAILED") + (f" ({counts})" if counts else "")
        lines.append(f"| {name} | {result} {step.get('summary') or ''} | {step['seconds']} |")
    figures = report["steps"].get("benchmark", {}).get("figures")
    if figures:
        sys.path.insert(0, str(ROOT))
        from resq_kernels.testing import bench_cuda

        lines += ["", "```", json.dumps(figures["device"], indent=1), "```", ""]
        lines.append(
            f"Copy bandwidth {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s; 8-bit wgmma "
        )
        rate = figures["int8_operations_per_second"]
        lines[-1] += f"{rate / 1e12:.0f} TOP/s." if rate else "not measured."
        lines += ["", bench_cuda.markdown(figures)]
    for name, step in report["steps"].items():
        if not step["passed"]:
            lines += ["", f"## {name}: end of its output", "", "```", str(step["output"]), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--skip", nargs="*", default=[], choices=STEPS)
    parser.add_argument("--models", default="llama-3-8b", help="of the benchmark, with commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = ROOT / "out/gpu-check"
    scratch.mkdir(parents=True, exist_ok=True)
    steps = {
        "tests": lambda: tests(scratch),
        "memcheck": lambda: sanitizer("memcheck"),
        "racecheck": lambda: sanitizer("racecheck"),
        "benchmark": lambda: benchmark(scratch, arguments.models),
    }
    report = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "steps": {"build": build()}}
    if report["steps"]["build"]["passed"]:
        for name in STEPS:
            if name not in arguments.skip:
                step = report["steps"][name] = steps[name]()
                result = "passed" if step["passed"] else "FAILED"
                print(f"{name}: {result} in {step['seconds']} s", flush=True)
    figures = report["steps"].get("benchmark", {}).get("figures")
    gpu = figures["device"]["gpu"] if figures else "gpu"
    name = f"{report['date']}_gpu-check_{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    for suffix, text in (("json", json.dumps(report, indent=1)), ("md", markdown(report))):
        partial = arguments.out / f"{name}.{suffix}.partial"
        partial.write_text(text)
        partial.replace(arguments.out / f"{name}.{suffix}")
    print(f"report: {arguments.out / name}.md")
    return 0 if all(step["passed"] for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
