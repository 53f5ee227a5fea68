"""`resq quantize` of a source that is converted first: OUT.source, interruptions, processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Result
from source_cases import CARD, CONFIG, WEIGHTS, folder, pickled, same, single

from resq_kernels.ptq import float_folder
from resq_kernels.ptq import quantize as stage
from resq_kernels.ptq.workspace import Workspace


@pytest.fixture
def options(text_file: Path) -> tuple[object, ...]:
    return ("--calib", text_file, "--samples", 2, "--seqlen", 32)


class Interruption(Exception):
    pass


@pytest.fixture
def interrupted(
    tmp_path: Path, options: Any, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A source in pickles, and an OUT that was begun: stopped in the second layer."""
    source = pickled(folder(tmp_path / "plain" / "model"), tmp_path / "pickles" / "model")
    calls = iter(range(100))
    original = stage.fuse_layer

    def fuse_layer(*args: object) -> object:
        if next(calls) == 1:
            raise Interruption
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "fuse_layer", fuse_layer)
        result = resq("quantize", source, tmp_path / "work" / "out", *options)
    kept = tmp_path / "work" / "out.source"
    assert result.code == 1 and f"the converted model in {kept} (--resume)" in result.err
    assert (kept / "model" / WEIGHTS).is_file()
    return source, tmp_path / "work" / "out"


def test_a_run_resumes_from_what_was_converted(
    interrupted: tuple[Path, Path],
    tmp_path: Path,
    options: Any,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = interrupted
    assert resq("quantize", source, tmp_path / "whole", *options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(float_folder, "convert", None)  # is not done again
        result = resq("quantize", source, out, *options, "--resume")
    assert result.code == 0, result.err
    assert same(out, tmp_path / "whole", (WEIGHTS, CONFIG, CARD, "tokenizer.json"))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    finished = resq("quantize", source, out, *options, "--resume")
    assert finished.code == 0 and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_source_that_changed_is_noticed(
    interrupted: tuple[Path, Path], options: Any, resq: Callable[..., Result]
) -> None:
    source, out = interrupted
    tensors = torch.load(source / "pytorch_model.bin")
    tensors["model.norm.weight"] += 1
    single(source, tensors)
    result = resq("quantize", source, out, *options, "--resume")
    assert result.code == 1 and "pytorch_model.bin has changed" in result.sentence
    assert str(source) in result.sentence and (out.parent / "out.source").is_dir()


def test_two_processes_do_not_take_each_others_source(
    tmp_path: Path, options: Any, resq: Callable[..., Result]
) -> None:
    source = pickled(folder(tmp_path / "plain"), tmp_path / "model")
    (tmp_path / "out.source").mkdir()
    (tmp_path / "out.source" / "mine").write_text("a user's file")
    result = resq("quantize", source, tmp_path / "out", *options)
    assert result.code == 1 and "out.source: expected the converted source" in result.sentence
    shutil.rmtree(tmp_path / "out.source")
    other = Workspace(tmp_path / "out.source")
    other.root.mkdir()
    other.lock()
    (other.root / "inputs.json").write_text("{}")
    try:
        result = resq("quantize", source, tmp_path / "out", *options)
    finally:
        other.close()
    assert result.code == 1 and "another process is quantizing" in result.sentence
    assert (other.root / "inputs.json").exists()
    # What a process that was killed while it converted leaves is overwritten.
    (other.root / "inputs.json").unlink()
    (other.root / "inputs.json.tmp").touch()
    (other.root / "model.1.unfinished").mkdir()
    assert resq("quantize", source, tmp_path / "out", *options).code == 0
    assert not other.root.exists()


def test_the_cache_of_the_hub_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "models--owner--name" / "snapshots" / "abc"
    path.mkdir(parents=True)
    (path / CONFIG).write_text("{}")
    assert float_folder.Source(path).name == Path("models--owner--name/snapshots/abc")
