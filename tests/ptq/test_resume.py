"""A killed quantization continues, with the same bits; anything else is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_kernels.checkpoint import validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq import quantize as stage
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.workspace import fingerprint
from resq_kernels.safetensors_io import CheckpointError

SCRIPT = Path(__file__).with_name("kill_points.py")


class Interruption(Exception):
    pass


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (3, 40))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, qwen2: Path, windows: torch.Tensor) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_folder(qwen2, out, windows, ResQConfig(), progress=False)
    return out


def same_bytes(a: Path, b: Path) -> bool:
    files = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    reports = {"quantization_report.json", "quantization_report.html"}  # they hold the time
    return files[0] == files[1] and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in set(files[0]) - reports
    )


@pytest.mark.parametrize("mode", ["after", "before", "timer"])
def test_killed_at_every_step(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path, mode: str
) -> None:
    torch.save(windows, tmp_path / "tokens.pt")
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, qwen2, out, tmp_path / "tokens.pt", mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # 25 files get a name; attempts of 1, 2, 3, ... files each stop in every stage.
    assert int(done.stdout) >= (5 if mode != "timer" else 1)
    assert same_bytes(out, whole)
    assert not (tmp_path / "out.partial").exists()


def interrupt(
    monkeypatch: pytest.MonkeyPatch, qwen2: Path, windows: torch.Tensor, out: Path
) -> None:
    """Stops a run in its second layer."""
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        original = stage.fuse_layer

        def fuse_layer(*args: object) -> object:
            if next(calls) == 1:
                raise Interruption
            return original(*args)

        patch.setattr(stage, "fuse_layer", fuse_layer)
        with pytest.raises(Interruption):
            quantize_folder(qwen2, out, windows, ResQConfig(), progress=False)


def test_resumes_without_doing_finished_layers_again(
    qwen2: Path,
    windows: torch.Tensor,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, qwen2, windows, out)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    fused = []
    original = stage.fuse_layer

    def fuse_layer(model: object, index: int, *rest: object) -> object:
        fused.append(index)
        return original(model, index, *rest)

    monkeypatch.setattr(stage, "fuse_layer", fuse_layer)
    quantize_folder(qwen2, out, windows, ResQConfig(), resume=True, progress=False)
    assert fused == [1]
    assert same_bytes(out, whole)


def test_other_inputs_are_refused(
    qwen2: Path,
    llama: Path,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, qwen2, windows, out)
    with pytest.raises(FileExistsError, match=r"out.partial: an interrupted .*resume it, or remo"):
        quantize_folder(qwen2, out, windows, ResQConfig(), progress=False)
    other = windows.clone()
    other[0, 0] += 1
    for source, tokens, config, word in (
        (qwen2, other, ResQConfig(), "calibration"),
        (qwen2, windows, ResQConfig(seed=1), "config"),
        (llama, windows, ResQConfig(), "model"),
        (llama, other, ResQConfig(), "model and calibration"),
    ):
        with pytest.raises(ValueError, match=f"begun with another {word};"):
            quantize_folder(source, out, tokens, config, resume=True, progress=False)
    assert not out.exists()


def test_a_finished_folder_stays(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path
) -> None:
    before = (whole / "quantization_report.json").read_bytes()
    report = quantize_folder(qwen2, whole, windows, ResQConfig(), resume=True, progress=False)
    assert report == json.loads(before)
    for resume, config in ((False, ResQConfig()), (True, ResQConfig(seed=1))):
        with pytest.raises(FileExistsError, match="expected a new folder, but it exists"):
            quantize_folder(qwen2, whole, windows, config, resume=resume, progress=False)
    assert (whole / "quantization_report.json").read_bytes() == before
    validate(whole)
    with pytest.raises(CheckpointError, match=r"already quantized \(quant_method 'resq'\)"):
        quantize_folder(whole, tmp_path / "again", windows, progress=False)


def test_fingerprint_sees_large_files(tmp_path: Path) -> None:
    """Of a file beyond 64 MiB only blocks are read: its size, both ends and what lies between.

    Of this one, 63 gaps of 3 KB are left out.
    """
    path, tokens = tmp_path / "weights", torch.zeros(1, 4, dtype=torch.int64)
    size = (64 << 20) + (192 << 10)
    with path.open("wb") as stream:
        stream.truncate(size)

    def now() -> str:
        return fingerprint([path], tokens, ResQConfig())["model"]

    seen = {now()}
    for place in (0, size // 3, size - 1):
        with path.open("rb+") as stream:
            stream.seek(place)
            stream.write(b"\1")
        seen.add(now())
    with path.open("ab") as stream:
        stream.write(b"\0")
    seen.add(now())
    assert len(seen) == 5
