"""The small demo: its promises can fail; a reduced run keeps them and writes a report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import demo_common as common
import demo_report
import demo_small
import pytest

EXAMPLES = Path(demo_small.__file__).resolve().parent


def rows(**perplexities: float) -> dict[str, common.Row]:
    """Rows with the perplexities of a good run, but for those that are given."""
    usual = {
        common.BASELINE: 20.0,
        common.RTN: 900.0,
        common.ROTATION: 21.0,
        common.RESQ_RTN: 20.6,
        common.RESQ_GPTQ: 20.5,
    }
    found = usual | {getattr(common, name): value for name, value in perplexities.items()}
    return {
        name: common.Row(
            name=name,
            folder="",
            dtype="bfloat16",
            perplexity=value,
            increase=value / found[common.BASELINE] - 1,
            kl_to_baseline=0.0,
            top1_agreement=1.0,
            bytes_total=1,
            bytes_linears=1,
            decode_tokens_per_second=1.0,
            prefill_tokens_per_second=1.0,
            quantize_seconds=1.0,
            layers=[],
        )
        for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("perplexities", "broken"),
    [
        ({}, None),
        ({"RESQ_GPTQ": 21.1, "ROTATION": 30.0}, "within 5 %"),
        ({"RTN": 39.0}, "ruins the model"),
        ({"ROTATION": 20.6}, "rotation only loses at least 1.5 times"),
        ({"RESQ_GPTQ": 20.8}, "rotation only loses at least 1.5 times"),
    ],
)
def test_promises_break_when_a_figure_does(
    perplexities: dict[str, float], broken: str | None
) -> None:
    checks = demo_small.promises(demo_small.OUTLIERS, rows(**perplexities))
    failed = [check.promise for check in checks if not check.ok]
    assert len(checks) == 3
    assert len(failed) == (broken is not None)
    assert broken is None or broken in failed[0]


def test_plain_model_is_not_expected_to_be_ruined() -> None:
    (check,) = demo_small.promises(demo_small.PLAIN, rows(RTN=21.0))
    assert check.ok


class _Elements(HTMLParser):
    """Counts elements and notes what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.external: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.external += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]


def elements(page: str) -> _Elements:
    parser = _Elements()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """`examples/demo_small.py --quick` as a user starts it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, EXAMPLES / "demo_small.py", "--quick", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, capture_output=True, text=True, env=environment), out


def test_demo_keeps_its_promises(run: tuple[subprocess.CompletedProcess, Path]) -> None:
    done, out = run
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    (model,) = results["models"]
    assert model["name"] == demo_small.OUTLIERS
    assert [row["name"] for row in model["rows"]] == [common.BASELINE, *common.VARIANTS]
    for row in model["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(common.Row)}
        assert f"{row['perplexity']:.3f}" in done.stdout
    assert len(results["checks"]) == 4
    assert all(check["ok"] for check in results["checks"])
    baseline, *quantized = model["rows"]
    for row in quantized:
        assert row["bytes_linears"] < baseline["bytes_linears"] / 3.3
        assert len(row["layers"]) == 4 * 7


def test_report_is_self_contained(run: tuple[subprocess.CompletedProcess, Path]) -> None:
    page = (run[1] / "report.html").read_text()
    found = elements(page)
    assert (found.counts["svg"], found.counts["h2"]) == (3, 5)
    assert found.counts["table"] == 2
    assert found.external == []
    assert "<td>ResQ, GPTQ</td>" in page and "<td>16-bit, run in bfloat16</td>" in page


def test_markdown_has_every_row(run: tuple[subprocess.CompletedProcess, Path]) -> None:
    results = json.loads((run[1] / "results.json").read_text())
    lines = demo_report.markdown(results).splitlines()
    assert lines[0].startswith("small Llama with planted outliers, ")
    found = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert len(found) == 1 + len(results["models"][0]["rows"])
    for cells, row in zip(found[1:], results["models"][0]["rows"], strict=True):
        assert row["name"] in cells[0] and cells[1].startswith(f"{row['perplexity']:.2f}")
        assert len(cells) == 7


def test_report_shows_two_models_and_a_broken_promise(
    run: tuple[subprocess.CompletedProcess, Path],
) -> None:
    results = json.loads((run[1] / "results.json").read_text())
    results["models"] *= 2
    results["checks"][0] |= {"ok": False, "measured": "<6 %>"}
    page = demo_report.render(results)
    assert elements(page).counts["table"] == 4
    assert "<li class='failed'>FAILED: " in page and "(&lt;6 %&gt;)" in page


def test_saved_folder_talks(run: tuple[subprocess.CompletedProcess, Path]) -> None:
    folder = run[1] / "models" / "outliers" / "resq-gptq"
    command = [
        sys.executable,
        "-m",
        "resq_kernels",
        "generate",
        folder,
        "--prompt",
        demo_small.PROMPT,
    ]
    done = subprocess.run([*command, "--max-new-tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(demo_small.PROMPT)
    assert str(folder) in run[0].stdout
