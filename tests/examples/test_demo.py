"""The demo on a real model, here a tiny one: its promises can fail, and a run makes them."""

from __future__ import annotations

import json
from pathlib import Path

import demo
import demo_common as common
import demo_report
import demo_small
import pytest
import smollm2
import torch

from resq_kernels.testing.tiny_models import save_tiny_model


def row(name: str, **values: float) -> common.Row:
    """A row of a good run, but for the values that are given."""
    usual = {
        common.BASELINE: (20.0, 0.0, 1.0, 1000, 1000),
        common.RTN: (2000.0, 4.5, 0.1, 330, 270),
        common.ROTATION: (40.0, 0.6, 0.6, 330, 270),
        common.RESQ_GPTQ: (25.0, 0.2, 0.75, 350, 290),
        common.RESQ_WIDE: (22.0, 0.1, 0.85, 350, 290),
    }
    names = ("perplexity", "kl_to_baseline", "top1_agreement", "bytes_total", "bytes_linears")
    found = dict(zip(names, usual[name], strict=True)) | values
    return common.Row(
        name=name,
        folder="",
        dtype="bfloat16",
        increase=found["perplexity"] / 20 - 1,
        decode_tokens_per_second=1.0,
        prefill_tokens_per_second=1.0,
        quantize_seconds=None,
        layers=[],
        **found,
    )


@pytest.mark.parametrize(
    ("name", "values", "broken"),
    [
        (common.RTN, {}, None),
        (common.RESQ_GPTQ, {"kl_to_baseline": 0.7}, "divergence"),
        (common.RTN, {"kl_to_baseline": 0.5}, "divergence"),
        (common.ROTATION, {"top1_agreement": 0.8}, "agreement"),
        (common.RTN, {"perplexity": 39.0}, "plain rounding ruins"),
        (common.RESQ_WIDE, {"kl_to_baseline": 0.14}, "activations in 8 bits"),
        (common.RESQ_GPTQ, {"bytes_total": 401}, "at most 40 %"),
        (common.RESQ_GPTQ, {"bytes_linears": 301}, "at most 40 %"),
    ],
)
def test_promises_break_when_a_figure_does(
    name: str, values: dict[str, float], broken: str | None
) -> None:
    names = (common.BASELINE, common.RTN, common.ROTATION, common.RESQ_GPTQ, common.RESQ_WIDE)
    rows = {other: row(other, **(values if other == name else {})) for other in names}
    failed = [check.promise for check in demo.promises("a model", rows) if not check.ok]
    assert len(failed) == (broken is not None)
    assert broken is None or broken in failed[0]


def test_a_run_measures_asks_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On random weights with a chat template. The rows need not keep the promises of a real model,
    which the exit code says."""
    out = tmp_path / "out"
    folder = save_tiny_model(tmp_path / "tiny", dtype=torch.bfloat16)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + m['content'] + '<|endoftext|>' }}{% endfor %}"
    )
    small = common.Settings(
        samples=4, seqlen=64, windows=2, check_windows=1, check_seqlen=32, new_tokens=2, rounds=1
    )
    monkeypatch.setattr(demo, "FULL", small)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(demo, "baseline_dtype", lambda: torch.float32)
    code = demo.main(["--model", str(folder), "--out", str(out)])
    shown = capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    failed = [check for check in results["checks"] if not check["ok"]]
    assert "the model writes 1 of 4 calibration windows" in shown.out
    assert code == bool(failed) and len(results["checks"]) == 6
    assert all(check["promise"] in shown.err for check in failed)
    (model,) = results["models"]
    names = [common.BASELINE, common.RTN, common.ROTATION, common.RESQ_GPTQ, common.RESQ_WIDE]
    assert [found["name"] for found in model["rows"]] == names
    assert [found["dtype"] for found in model["rows"]] == ["float32", *["bfloat16"] * 4]
    baseline, *quantized = model["rows"]
    assert baseline["top1_agreement"] == 1.0
    for found in quantized:
        assert 0 < found["top1_agreement"] < 1 and found["kl_to_baseline"] > 0
        assert f"{found['top1_agreement']:.1%}" in shown.out
    for question in demo.QUESTIONS:
        assert f"> {question}" in model["samples"]
    assert "\ntiny\n\n" in shown.out and "16-bit, run in float32" in shown.out
    assert "Python's own documentation and sources" in shown.out
    page = (out / "report.html").read_text()
    assert "<h1>ResQ on tiny: 16 bits against 4</h1>" in page and "WikiText-2 cannot be" in page
    assert "16-bit, run in float32" in demo_report.markdown(results)


def test_without_the_package_index_the_small_llama_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(downloads: Path, out: Path) -> Path:
        raise smollm2.Unavailable("no route")

    asked = []
    monkeypatch.setattr(smollm2, "model_folder", unavailable)
    monkeypatch.setattr(demo_small, "main", lambda argv: asked.append(argv) or 0)
    assert demo.main(["--out", str(tmp_path)]) == 0
    assert asked == [["--out", str(tmp_path)]]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "SmolLM2-135M-Instruct cannot be had (no route); the small Llama of examples/ instead"
    )
