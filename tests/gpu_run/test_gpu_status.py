"""docs/gpu-status.md is what the committed reports of GPU runs say."""

from __future__ import annotations

import json
from typing import Any

from test_gpu_check import ROOT, load

gpu_status = load("tools/gpu_status.py")


def report(date: str, kernels: str = "sm90", **statuses: str) -> dict[str, Any]:
    """A report of a run in which every step passed but for those given."""
    names = {step for *_, steps in gpu_status.ROWS for step in steps}
    steps = [{"name": n, "status": statuses.get(n.replace("-", "_"), "passed")} for n in names]
    info = {"name": "info", "status": "passed", "figures": {"cuda": {"devices": [{}]}}}
    info["figures"]["cuda"]["devices"][0]["kernels"] = kernels
    machine = {"gpu": "NVIDIA X1"}
    return {"date": date, "commit": "abc", "machine": machine, "steps": [info, *steps]}


def row(page: str, what: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {what} |"))


def test_the_page_is_what_the_reports_say() -> None:
    found = [json.loads(path.read_text()) for path in sorted(ROOT.glob(gpu_status.REPORTS))]
    assert (ROOT / "docs/gpu-status.md").read_text() == gpu_status.page(found)


def test_rows_of_a_report() -> None:
    page = gpu_status.page([report("2026-12-01", values_hadamard="timeout", compile="skipped")])
    assert row(page, "mixed_quantize").endswith("passed: NVIDIA X1, 2026-12-01, commit abc |")
    assert "**values-hadamard timeout**: NVIDIA X1" in row(page, "hadamard")
    assert row(page, "torch.compile, opcheck").endswith("never run |")
    assert row(page, "mixed_gemm sm80").endswith("never run |")  # another family ran
    assert "No kernel has run" not in page
    partly = gpu_status.page([report("2026-12-01", values_hadamard="skipped")])
    assert row(partly, "hadamard").endswith("commit abc (without values-hadamard) |")


def test_the_latest_report_counts_and_a_dry_run_does_not() -> None:
    old = report("2026-12-01")
    new = report("2026-12-05", first_mixed_gemm="failed", memcheck="skipped")
    dry = report("2026-12-09") | {"dry": True}
    page = gpu_status.page([old, new, dry])
    assert "2026-12-05" in row(page, "mixed_quantize") and "2026-12-09" not in page
    assert "**first-mixed_gemm failed**" in row(page, "mixed_gemm sm90")
    assert "2026-12-01" in row(page, "memory (compute-sanitizer memcheck)")
    assert "No kernel has run" in gpu_status.page([dry])


def test_reports_of_one_run_in_several_parts_are_one() -> None:
    first = report("2026-12-01", values_hadamard="skipped", compile="skipped")
    second = report("2026-12-01")
    second["steps"] = [s for s in second["steps"] if s["name"] in ("info", "values-hadamard")]
    page = gpu_status.page([first, second])
    assert row(page, "hadamard").endswith("passed: NVIDIA X1, 2026-12-01, commit abc |")
    assert row(page, "mixed_quantize").endswith("passed: NVIDIA X1, 2026-12-01, commit abc |")
    assert row(page, "torch.compile, opcheck").endswith("never run |")
    again = report("2026-12-01")  # after the fault was mended, the same day
    assert "failed" not in gpu_status.page([report("2026-12-01", first_mixed_gemm="failed"), again])
