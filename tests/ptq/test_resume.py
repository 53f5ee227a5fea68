"""A killed quantization continues, with the same bits; anything else is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_kernels.checkpoint import validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq import quantize as stage
from resq_kernels.ptq.inputs import hashes
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.workspace import INPUTS_FILE
from resq_kernels.safetensors_io import CheckpointError, read_json, write_json

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
    calibration = r"the calibration tokens \(.*\) differ"
    for source, tokens, config, words in (
        (qwen2, other, ResQConfig(), calibration),
        (qwen2, windows, ResQConfig(seed=1), "seed was 0 and is 1"),
        (llama, windows, ResQConfig(), "config.json has changed, .*model.safetensors is new"),
        (llama, other, ResQConfig(), f"config.json has changed, .*{calibration}"),
    ):
        with pytest.raises(FileExistsError, match=f"cannot resume.* other inputs: {words}"):
            quantize_folder(source, out, tokens, config, resume=True, progress=False)
    record = tmp_path / "out.partial" / INPUTS_FILE
    stored = read_json(record)
    for key, was in (("device", "cuda"), ("version", "resq_kernels 0.0.1")):
        write_json(record, stored | {key: was})
        with pytest.raises(FileExistsError, match=f"{key} was '{was}' and is '"):
            quantize_folder(qwen2, out, windows, resume=True, progress=False)
    assert not out.exists()


def test_a_changed_byte_of_the_source_is_noticed(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every file that is read or copied, though size and time stay: begun, and finished."""
    source, begun, finished = (tmp_path / name for name in ("model", "begun", "finished"))
    shutil.copytree(qwen2, source)
    (source / "README.md").write_text("a model card")
    shutil.copytree(whole, finished)
    interrupt(monkeypatch, source, windows, begun)
    names = set(read_json(tmp_path / "begun.partial" / INPUTS_FILE)["files"])
    assert names == {path.name for path in qwen2.iterdir()}
    for name in sorted(names):
        path = source / name
        before, times = path.read_bytes(), path.stat()
        place = before.rindex(b'"') if path.suffix == ".json" else len(before) - 100
        after = before[:place] + b" " + before[place:-1]
        if path.suffix != ".json":
            after = before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :]
        elif name in ("config.json", "model.safetensors.index.json"):
            after = before[:-1] + b" "  # still JSON
        assert len(after) == len(before)
        path.write_bytes(after)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        for out in (begun, finished):
            with pytest.raises(FileExistsError, match=f"other inputs: {name} has changed;"):
                quantize_folder(source, out, windows, resume=True, progress=False)
        path.write_bytes(before)
    (source / "LICENSE").write_text("new")
    with pytest.raises(FileExistsError, match="other inputs: LICENSE is new;"):
        quantize_folder(source, begun, windows, resume=True, progress=False)
    (source / "LICENSE").unlink()
    (source / "README.md").write_text("another model card")
    quantize_folder(source, begun, windows, resume=True, progress=False)
    assert same_bytes(begun, whole)


def test_a_source_that_changes_during_the_run_is_refused(
    qwen2: Path, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(qwen2, source)
    original = stage.fuse_layer

    def fuse_layer(*args: object) -> object:
        (source / "config.json").write_bytes((qwen2 / "config.json").read_bytes())
        return original(*args)

    monkeypatch.setattr(stage, "fuse_layer", fuse_layer)
    with pytest.raises(ValueError, match="config.json has changed while it was being quantized"):
        quantize_folder(source, out, windows, progress=False)
    assert not out.exists()


def test_hashes_cover_every_byte(tmp_path: Path) -> None:
    """Of a file of several blocks: beside the edges of blocks, and between them."""
    path = tmp_path / "weights"
    size = (9 << 20) + 12345
    path.write_bytes(bytes(size))

    def now() -> str:
        return hashes(tmp_path, [path])["weights"]

    assert now() == f"sha256:{hashlib.sha256(bytes(size)).hexdigest()}"
    seen = {now()}
    for place in (0, (4 << 20) - 1, 4 << 20, 6 << 20, size - 1):
        with path.open("rb+") as stream:
            stream.seek(place)
            stream.write(b"\1")
        seen.add(now())
    with path.open("ab") as stream:
        stream.write(b"\0")
    assert len(seen | {now()}) == 7


def test_a_finished_folder_that_was_changed_is_refused(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "notes.txt").write_text("the user's own")
    quantize_folder(qwen2, out, windows, resume=True, progress=False)
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    (out / "tokenizer.json").unlink()
    found = "model.safetensors has changed, tokenizer.json is gone"
    with pytest.raises(FileExistsError, match=f"not as it was written: {found};"):
        quantize_folder(qwen2, out, windows, resume=True, progress=False)


def test_a_finished_folder_stays(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path
) -> None:
    before = (whole / "quantization_report.json").read_bytes()
    report = quantize_folder(qwen2, whole, windows, ResQConfig(), resume=True, progress=False)
    assert report == json.loads(before)
    for resume, config, words in (
        (False, ResQConfig(), "expected a new folder, but it exists"),
        (True, ResQConfig(seed=1), "is finished, but was made from other inputs: seed was 0"),
    ):
        with pytest.raises(FileExistsError, match=words):
            quantize_folder(qwen2, whole, windows, config, resume=resume, progress=False)
    assert (whole / "quantization_report.json").read_bytes() == before
    validate(whole)
    with pytest.raises(CheckpointError, match=r"already quantized \(quant_method 'resq'\)"):
        quantize_folder(whole, tmp_path / "again", windows, progress=False)


@pytest.mark.parametrize(
    "name", ["basis.safetensors", "quantize-00000.safetensors", "rounded-00001.f32"]
)
def test_a_damaged_piece_is_named(
    qwen2: Path,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    interrupt(monkeypatch, qwen2, windows, tmp_path / "out")
    piece = tmp_path / "out.partial" / name
    piece.write_bytes(piece.read_bytes()[:-4])
    before = piece.read_bytes()
    with pytest.raises(CheckpointError, match=rf"{name}: expected .*; remove .*out\.partial and"):
        quantize_folder(qwen2, tmp_path / "out", windows, ResQConfig(), resume=True, progress=False)
    assert piece.read_bytes() == before


def test_an_edited_model_card_stays(
    qwen2: Path, windows: torch.Tensor, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "README.md").write_text("the user's own")
    report = quantize_folder(qwen2, out, windows, resume=True, progress=False)
    assert report == read_json(out / "quantization_report.json")
    assert (out / "README.md").read_text() == "the user's own"
