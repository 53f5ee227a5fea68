"""benchmarks/load_time.py: what it computes from its processes' figures, and one run of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_tokenizer, save_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/load_time.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_time", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"quantized": tmp_path / "q", "16-bit": tmp_path / "f"}
    for folder, size in zip(folders.values(), (1 << 20, 3 << 20), strict=True):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
    p, q = torch.rand(5, 7).softmax(-1), torch.rand(5, 7).softmax(-1)
    logits = {folders["16-bit"]: p.log(), folders["quantized"]: q.log() + 3}
    seconds = {
        folders["quantized"]: iter([99, 3, 6, 4]),
        folders["16-bit"]: iter([99, 2, 8, 1]),
    }

    def load(folder: Path, text: Path) -> tuple[list[float], torch.Tensor]:
        figure = next(seconds[folder])
        return [figure, figure + 1, 2 * figure, 100], logits[folder].clone()

    monkeypatch.setattr(script, "load", load)
    result = script.race(folders, tmp_path, 3)
    assert result["median"]["quantized"]["load_s"] == 4  # of 3, 6, 4: the first load does not count
    assert result["ratio"] == {
        "load_s": 2,
        "first_logits_s": 5 / 3,
        "load_cpu_s": 2,
        "peak_mib": 1,
        "files_mib": 1 / 3,
    }
    expected = (p.double() * (p.double() / q.double()).log()).sum(-1).mean().item()
    assert result["kl_nats"] == pytest.approx(expected, abs=1e-6)
    assert [row["load_s"] for row in result["turns"]["16-bit"]] == [2, 8, 1]

    seconds = {folder: iter([1, 1]) for folder in folders.values()}
    changing = iter([0.0, 0.0, 1e-6, 0.0])
    monkeypatch.setattr(
        script, "load", lambda folder, _: ([1] * 4, logits[folder] + next(changing))
    )
    with pytest.raises(RuntimeError, match="expected the same logits every time"):
        script.race(folders, tmp_path, 1)


@pytest.mark.slow
def test_a_run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny_model(tmp_path / "source", "qwen2")
    quantized = tmp_path / "quantized"
    random_quantized("qwen2").save_pretrained(quantized)
    make_tokenizer().save_pretrained(quantized)
    (tmp_path / "text.txt").write_text("a text of many words, and then of more words " * 20)
    names = (str(quantized), str(source), "--text", str(tmp_path / "text.txt"))
    script.main([*names, "--turns", "1", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("quantized", "16-bit"):
        figures = result["median"][name]
        assert 0 < figures["load_s"] < figures["first_logits_s"] < 60
        assert figures["peak_mib"] > 50 and figures["files_mib"] > 0
    assert "ratio" in capsys.readouterr().out
