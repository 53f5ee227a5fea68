"""tools/gpu_check.py with steps that do what must not cost the others their results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resq_kernels.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_check = load("tools/gpu_check.py")
from gpu.report import MOST_CHARACTERS, Report  # noqa: E402  (tools/ is on the path now)
from gpu.steps import STEPS, Step  # noqa: E402


def step(name: str, code: str, limit_s: float = 20, **rest: Any) -> Step:
    """A step that runs Python code."""
    return Step(name=name, arguments=("-c", code), limit_s=limit_s, decides="a test", **rest)


GOOD = "import sys; open(sys.argv[1] + '.json', 'w').write('{\"rows\": []}'); print('fine')"


def good(name: str) -> Step:
    """A step that passes and leaves a result."""
    return Step(name=name, arguments=("-c", GOOD, "{out}"), limit_s=20, decides="a test")


# A child, a child that leaves the group, and a grandchild of it whose parent has ended: each writes
# to the pipe of the step and would run on for a minute.
HANGS = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"]
subprocess.Popen(sleep)
subprocess.Popen(sleep, start_new_session=True)
grandchild = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", grandchild])
time.sleep(60)
"""
NAN = "import sys; open(sys.argv[1] + '.json', 'w').write('{\"rows\": [{\"us\": NaN}], \"x\": 1}')"
FLOOD = """
import sys
for i in range(300):
    open(f"{sys.argv[1]}.{i}", "w").write("x" * 10_000)
open(sys.argv[1] + ".large", "w").write("x" * 20_000_000)
open(sys.argv[1] + ".json", "w").write("[]")
print("the first line")
for _ in range(20_000):
    print("y" * 500)
print("the last line")
"""


def run(steps: list[Step], folder: Path, minutes: float = 10) -> dict[str, Any]:
    """Runs steps; the report as it was written, which must be JSON as others read it."""
    gpu_check.run_all(steps, Report(folder, {"date": "2026-01-01"}), minutes, False)

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in report["steps"]}


def sleepers() -> list[int]:
    """Processes of HANGS that are left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"time.sleep(60)" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_whatever_a_step_does_every_other_result_is_there(tmp_path: Path) -> None:
    steps = [
        good("before"),
        step("fails", "print('why it failed'); raise SystemExit(3)"),
        step("hangs", HANGS, limit_s=4),
        step("crashes", "import ctypes; print('then', flush=True); ctypes.string_at(0)"),
        step("killed under a tool", "raise SystemExit(139)"),
        Step(name="nan", arguments=("-c", NAN, "{out}"), limit_s=20, decides="a test"),
        Step(name="floods", arguments=("-c", FLOOD, "{out}"), limit_s=60, decides="a test"),
        Step(name="absent", arguments=(), wrapper=("/no/such/tool",), limit_s=9, decides="a test"),
        good("after"),
    ]
    start = time.monotonic()
    report = run(steps, tmp_path)
    assert statuses(report) == {
        "before": "passed",
        "fails": "failed",
        "hangs": "timeout",
        "crashes": "crashed",
        "killed under a tool": "crashed",
        "nan": "failed",
        "floods": "passed",
        "absent": "failed",
        "after": "passed",
    }
    assert time.monotonic() - start < 60 and not sleepers()
    entries = {entry["name"]: entry for entry in report["steps"]}
    for name in ("before", "after"):
        assert entries[name]["figures"] == {"rows": []}
    assert entries["nan"]["figures"] == {"rows": [{"us": None}], "x": 1}
    assert "rows[0].us: expected a number, got nan" in entries["nan"]["summary"]
    assert "why it failed" in entries["fails"]["end"] and entries["fails"]["exit_code"] == 3
    assert "stopped after 4 s" in entries["hangs"]["end"]
    assert "signal 11 (Segmentation fault)" in entries["crashes"]["end"]
    assert "/no/such/tool" in entries["absent"]["end"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "logs.tar.gz",
        "report.json",
        "report.md",
    ]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 16 << 20
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        log = archive.extractfile("floods/log.txt").read().decode()
        names = archive.getnames()
    assert log.startswith("the first line") and "\nthe last line\n" in log[-100:]
    assert "bytes left out" in log and len(log) < 300_000
    assert "floods/result.large" not in names and "before/result.json" in names


def test_the_report_is_there_after_every_step_even_if_the_run_is_killed(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tools")!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_gpu_check import Report, gpu_check, good, step
hangs = step("hangs", "import time; time.sleep(60)", limit_s=60)
report = Report(Path({str(tmp_path)!r}), {{"date": "2026-01-01"}})
gpu_check.run_all([good("first"), good("second"), hangs], report, 10, False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "second" not in statuses(read(tmp_path)) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pid in sleepers():
            os.kill(pid, signal.SIGKILL)
    assert statuses(read(tmp_path)) == {"first": "passed", "second": "passed"}
    assert "second" in (tmp_path / "report.md").read_text()
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "second/log.txt" in archive.getnames()


def read(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.exists() else {"steps": []}


ODD = {
    "deep": "'[' * 100_000",
    "a constant": '\'{"rows": [{"us": Infinity}]}\'',
    "too large": "'[' + '1, ' * 2_000_000 + '1]'",
    "no text": "'\\udcff{}'.encode('utf-8', 'surrogateescape').decode('latin-1')",
}
ODD_FIGURES = {
    "a surrogate": {"rows": [{"op": "\ud800", "ours_us": 1.0}]},
    "rows that are numbers": {"rows": [1, 2]},
    "rows that are no list": {"rows": {"a": 1}},
    "a word for a time": {"rows": [{"op": "x", "ours_us": "fast"}]},
    "odd choices": {"choices": [{"model": 1}]},
}


def test_an_odd_result_costs_its_own_step(tmp_path: Path) -> None:
    write = "import sys; open(sys.argv[1] + '.json', 'w').write({})"
    texts = ODD | {name: repr(json.dumps(value)) for name, value in ODD_FIGURES.items()}
    steps = [
        Step(name=name, arguments=("-c", write.format(text), "{out}"), limit_s=20, decides="")
        for name, text in texts.items()
    ]
    none = Step(name="none", arguments=("-c", "pass", "{out}"), limit_s=20, decides="")
    signal_40 = step("signal 40", "import os; os.kill(os.getpid(), 40)")
    report = run([*steps, none, signal_40, good("after")], tmp_path)
    expected = dict.fromkeys([*ODD, "none"], "failed") | dict.fromkeys(ODD_FIGURES, "passed")
    assert statuses(report) == expected | {"signal 40": "crashed", "after": "passed"}
    text = (tmp_path / "report.md").read_text()
    assert "rows that are numbers: its rows cannot be read" in text and "after " in text


def test_what_the_environment_of_a_step_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTEST_ADDOPTS", "PY_COLORS", "FORCE_COLOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("RESQ_COMMIT", "abc")
    gpu_check.commit.cache_clear()
    show = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + '.json', 'w'))"
    entry = Step(
        name="show",
        arguments=("-c", show, "{out}"),
        limit_s=20,
        decides="",
        environment={"RESQ_DEPENDENT_LAUNCHES": "0"},
    )
    found = run([entry], tmp_path)["steps"][0]["figures"]
    gpu_check.commit.cache_clear()
    assert not {"PYTEST_ADDOPTS", "PY_COLORS", "FORCE_COLOR"} & set(found)
    assert found["PYTHONPATH"] == f"{ROOT}:/elsewhere"
    assert found["PATH"].split(":")[-1] == "/usr/local/cuda/bin"
    assert (found["RESQ_COMMIT"], found["RESQ_DEPENDENT_LAUNCHES"]) == ("abc", "0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_step_behind(number: int, tmp_path: Path) -> None:
    """At once, or after SIGKILL when the next one starts."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tools")!r}]
import gpu_check
from gpu.steps import Step
step = Step(name="info", arguments=("-c", {HANGS!r}), limit_s=60, decides="")
gpu_check.STEPS = [step]
gpu_check.LIBRARIES = ()
sys.argv = ["gpu_check", "--out", {str(tmp_path / "out")!r}]
raise SystemExit(gpu_check.main())
"""
    # Whatever started these tests may ignore signals, which a child inherits.
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        preexec_fn=lambda: [
            signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)
        ],
    )

    def of_the_step() -> list[int]:
        marked = gpu_check.runner.marked()
        return [pid for pid, of in marked.items() if of.startswith(f"{process.pid}-")]

    end = time.monotonic() + 30
    while len(of_the_step()) < 4 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(of_the_step()) >= 4  # a fifth may be about to end
    process.send_signal(number)
    process.wait(20)
    if number == signal.SIGKILL:
        assert of_the_step()
        gpu_check.runner.kill_left_over()
    assert not of_the_step()
    assert read(tmp_path / "out")["steps"] == []


def test_minutes_take_the_steps_that_fit_in_order_of_value(tmp_path: Path) -> None:
    steps = [
        step("quick", "pass", limit_s=3),
        step("too long", "pass", limit_s=60),
        step("fits", "pass", limit_s=3),
        step("uses it up", "import time; time.sleep(60)", limit_s=6),
        step("no time", "pass", limit_s=6),
    ]
    seconds = 11 + gpu_check.REPORTING_SECONDS
    start = time.monotonic()
    report = run(steps, tmp_path, minutes=seconds / 60)
    assert time.monotonic() - start < seconds
    assert list(statuses(report).values()) == ["passed", "skipped", "passed", "timeout", "skipped"]
    assert "no time left; --only takes them: too long no time" in (
        tmp_path / "report.md"
    ).read_text().replace("skipped, ", "")


def test_a_full_disk_costs_one_version_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        calls.append(path)
        if 3 < len(calls) <= 6:
            raise OSError(28, "No space left on device")
        return right(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    report = run([good("first"), good("second"), good("third")], tmp_path)
    assert list(statuses(report)) == ["first", "second", "third"]
    assert "No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "status"),
    [
        ("..s\n2 passed, 1 skipped in 0.01s", "passed"),
        ("sss\n3 skipped in 0.01s", "failed"),
        ("", "failed"),
    ],
)
def test_tests_that_show_nothing_have_not_passed(output: str, status: str, tmp_path: Path) -> None:
    tests = Step(
        name="tests", arguments=("-c", f"print({output!r})", "pytest"), limit_s=9, decides="a test"
    )
    entry = run([tests], tmp_path)["steps"][0]
    assert entry["status"] == status
    assert status == "failed" or entry["summary"] == "2 passed, 1 skipped"


def test_a_tool_that_says_nothing_has_not_passed(tmp_path: Path) -> None:
    options = {"wrapper": ("env",), "summary": "ERROR SUMMARY: (.*)"}
    steps = [
        step(
            "says", "print('ERROR SUMMARY: 1 error'); print('ERROR SUMMARY: 0 errors')", **options
        ),
        step("silent", "print('nothing')", **options),
    ]
    report = run(steps, tmp_path)
    assert list(statuses(report).values()) == ["passed", "failed"]
    assert report["steps"][0]["summary"] == "0 errors"


def test_without_cuda_s_kernels_nothing_else_is_tried(tmp_path: Path) -> None:
    text = json.dumps({"cuda": {"used": False, "why_not": "no driver"}})
    write = f"import sys; open(sys.argv[1] + '.json', 'w').write({text!r})"
    info = Step(name="info", arguments=("-c", write, "{out}"), limit_s=20, decides="a test")
    report = run([info, good("next")], tmp_path)
    assert list(statuses(report).values()) == ["passed", "skipped"]
    assert report["steps"][1]["summary"] == "no kernels of CUDA here: no driver"
    report = run([step("info", "raise SystemExit(1)"), good("next")], tmp_path)
    assert list(statuses(report).values()) == ["failed", "skipped"]
    report = run([step("info", "import time; time.sleep(60)", limit_s=1), good("next")], tmp_path)
    assert list(statuses(report).values()) == ["timeout", "passed"]


def test_the_markdown_fits_and_names_every_failure_first(tmp_path: Path) -> None:
    report = Report(tmp_path, {"date": "2026-01-01", "machine": {"gpu": "X1"}, "commit": "abc"})
    row = {"op": "mixed_gemm", "model": "llama-3-8b", "layer": "qkv", "ours_us": 12.34}
    row |= {"ceiling_share": 0.5, "baseline": "F.linear bf16", "baseline_us": 30.0, "ratio": 2.43}
    for number in range(40):
        rows = [row | {"batch": batch} for batch in range(40)]
        entry = gpu_check.skipped(STEPS[0], "") | {"name": f"step-{number}", "status": "passed"}
        report.steps.append(entry | {"figures": {"rows": rows}})
    report.steps.append(report.steps[0] | {"name": "bad", "status": "crashed", "end": "why"})
    text = report.markdown()
    assert len(text) <= MOST_CHARACTERS + 100
    assert text.index("## bad: crashed") < text.index("## step-0")
    assert "12.3  0.50   2.43 F.linear bf16" in text and "24 lines more" in text
    assert "sections more in report.json" in text


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_an_older_report_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("older")
    done = program("--dry", "--out", str(tmp_path))
    assert done.returncode == 2 and "--out: expected a folder without a report, got" in done.stderr
    assert (tmp_path / "report.json").read_text() == "older"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--out out --only gem", "--only: invalid choice: 'gem'"),
        ("--out out --only gemm --from gemm", "not allowed with argument"),
        ("--out out --minutes 0", "--minutes: expected more than 0, got 0"),
        ("--out /dev/null/x --dry", "--out: expected a folder that can be written to, got"),
        ("--dry", "the following arguments are required: --out"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(arguments: str, sentence: str) -> None:
    done = program(*arguments.split())
    assert done.returncode == 2 and sentence in done.stderr


def test_every_benchmark_s_command_line_is_one_of_the_program() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for entry in STEPS:
        if entry.arguments[:3] == ("-m", "resq_kernels", "bench"):
            args = build_parser().parse_args(list(entry.arguments[2:]))
            assert (args.command, args.device, args.out) == ("bench", "cuda", "{out}")


def test_every_test_that_a_step_names_exists() -> None:
    from _pytest.mark.expression import Expression

    for entry in STEPS:
        if "pytest" not in entry.arguments:
            continue
        paths = [part for part in entry.arguments if part.startswith("tests/")]
        assert paths
        for path in paths:
            file, _, name = path.partition("::")
            found = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)
            assert not name or name in found
            if "-k" in entry.arguments:
                text = entry.arguments[entry.arguments.index("-k") + 1]
                wanted = Expression.compile(text)
                assert any(wanted.evaluate(lambda part, t=t: part in t) for t in found), text


def test_every_test_file_is_in_a_step() -> None:
    named = " ".join(shlex.join(entry.arguments) for entry in STEPS)
    for path in (ROOT / "tests/gpu").glob("test_*.py"):
        assert f"tests/gpu/{path.name}" in named
