"""Where OUT may be: what stands in its way is followed or refused before any work."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resq_kernels.checkpoint import validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq import float_folder, pipeline
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.workspace import INPUTS_FILE, LOCK_FILE, Workspace, check_out
from resq_kernels.safetensors_io import CheckpointError

OPTIONS = ResQConfig(weights="rtn")
RUN = """
import sys, torch
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.pipeline import quantize_folder
torch.set_num_threads(1)
torch.manual_seed(0)
windows = torch.randint(0, 256, (2, 16))
print("ready", flush=True)
sys.stdin.readline()
try:
    quantize_folder(sys.argv[1], sys.argv[2], windows, ResQConfig(weights="rtn"),
                    resume=sys.argv[3] == "True", progress=False)
except FileExistsError as error:
    print(error)
"""


@pytest.fixture
def windows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 16))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a stage begins."""
    monkeypatch.setattr(pipeline, "_layers", lambda *_: pytest.fail("the work began"))


def test_links_are_followed(llama: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    quantize_folder(llama, tmp_path / "plain", windows, OPTIONS, progress=False)
    expected = (tmp_path / "plain" / "model.safetensors").read_bytes()
    target = tmp_path / "disk" / "deep" / "target"
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "parent").symlink_to(tmp_path / "other")
    below = tmp_path / "parent" / "out", tmp_path / "other" / "out"
    for out, real in ((tmp_path / "link", target), below):
        quantize_folder(llama, out, windows, OPTIONS, progress=False)
        assert real.is_dir() and not real.is_symlink()
        assert (out / "model.safetensors").read_bytes() == expected
        assert sorted(real.parent.iterdir()) == [real]
        quantize_folder(llama, out, windows, OPTIONS, resume=True, progress=False)


def test_a_folder_inside_the_source(llama: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for resume in (False, True):
        quantize_folder(source, source / "q4", windows, OPTIONS, resume=resume, progress=False)
    validate(source / "q4")
    assert {path.name for path in source.iterdir()} == {*(p.name for p in llama.iterdir()), "q4"}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_no_new_folder_is_refused(
    llama: Path, windows: torch.Tensor, tmp_path: Path, resume: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("mine")
    (tmp_path / "a.partial").symlink_to(tmp_path / "folder")
    (tmp_path / "b.partial").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    new = "expected a new folder, but it exists"
    for out, words in (
        (tmp_path / "file", new),
        (tmp_path / "folder", new),
        (tmp_path / "full", new),
        (tmp_path / "link", new),
        (tmp_path / "loop", new),
        (llama, new),
        (tmp_path / "mine", "mine.partial: expected the work folder of .* got other files"),
        (tmp_path / "a", "a.partial: expected a folder on the file system of .*, got a link"),
        (tmp_path / "b", "b.partial: expected a folder on the file system of .*, got a link"),
    ):
        with pytest.raises(FileExistsError, match=words):
            quantize_folder(llama, out, windows, OPTIONS, resume=resume, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_at_its_start_is_no_obstacle(
    llama: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / LOCK_FILE).touch()
    quantize_folder(llama, tmp_path / "out", windows, OPTIONS, progress=False)
    validate(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at_deletion(survived: int) -> Iterator[None]:
    """Ends the block where it would delete one file or folder more than so many."""
    calls = iter(range(100))

    def ending(original: Callable[..., None]) -> Callable[..., None]:
        def delete(*args: object, **kwargs: object) -> None:
            if next(calls) == survived:
                raise Killed
            original(*args, **kwargs)

        return delete

    with pytest.MonkeyPatch.context() as patch:
        for name in ("unlink", "rmdir"):  # pathlib and shutil call these
            patch.setattr(os, name, ending(getattr(os, name)))
        yield


def filled(root: Path) -> Workspace:
    """A locked work folder with a record, a piece, unfinished states and a folder."""
    work = Workspace(root)
    root.mkdir(exist_ok=True)
    work.lock()
    (root / INPUTS_FILE).touch()
    work.save("basis", {"x": torch.ones(1)})
    work.hidden("states", (1, 1, 1)).begin()
    (root / "folder").mkdir(exist_ok=True)
    (root / "folder" / "config.json").touch()
    return work


@pytest.mark.parametrize("survived", range(8))
def test_a_removal_that_is_killed_leaves_a_work_folder(tmp_path: Path, survived: int) -> None:
    """After each of its seven deletions: of three files, two folders, the inputs and the lock."""
    work = filled(tmp_path / "out.partial")
    with killed_at_deletion(survived):
        if survived == 7:
            work.remove()
            assert not list(tmp_path.iterdir())
            return
        with pytest.raises(Killed):
            work.remove()
    work._unlock()
    check_out(tmp_path / "out", resume=True)
    if (work.root / INPUTS_FILE).exists():
        with pytest.raises(FileExistsError, match="an interrupted quantization is here"):
            check_out(tmp_path / "out", resume=False)
    else:
        check_out(tmp_path / "out", resume=False)
    filled(work.root).remove()
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_somebody_removes_hides_no_error(tmp_path: Path) -> None:
    work = filled(tmp_path / "out.partial")
    shutil.rmtree(work.root)
    work.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("survived", range(5))
def test_a_converted_source_that_is_half_deleted_does_not_pass_for_whole(
    tmp_path: Path, survived: int
) -> None:
    work = filled(tmp_path / "out.source")
    with killed_at_deletion(survived), pytest.raises(Killed):
        float_folder._forget(work)
        work.close()
    whole = (work.root / "folder" / "config.json").exists()
    assert whole or not (work.root / INPUTS_FILE).exists()
    float_folder.check_root(tmp_path / "out")
    work._unlock()
    filled(work.root).remove()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("resume", [False, True])
def test_a_locked_work_folder_is_refused_and_left_alone(
    llama: Path, windows: torch.Tensor, tmp_path: Path, resume: bool
) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    lock = os.open(work / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another process is quantizing into this folder"):
        quantize_folder(llama, tmp_path / "out", windows, OPTIONS, resume=resume, progress=False)
    assert [path.name for path in work.iterdir()] == [LOCK_FILE]
    os.close(lock)


def test_a_file_system_without_locks_is_a_warning(
    llama: Path, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"lock: cannot be locked \(Function not implemented\)"):
        quantize_folder(llama, tmp_path / "out", windows, OPTIONS, progress=False)
    validate(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_make_one_folder(
    llama: Path, windows: torch.Tensor, tmp_path: Path, resume: bool
) -> None:
    """Started at once: one makes the folder, the other is refused or finds it finished."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(llama), str(out), str(resume)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    refused = [text for text in said if text]
    words = ("another process", "expected a new folder", "an interrupted quantization is here")
    assert len(refused) <= 1 and all(any(word in text for word in words) for text in refused)
    assert resume or refused
    validate(out)
    quantize_folder(llama, tmp_path / "alone", windows, OPTIONS, progress=False)
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_what_is_copied_beside_the_weights(
    llama: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llama, source)
    copied = ("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "license.txt")
    copied += ("tokenizer.model", "vocab.txt", "preprocessor_config.json", "USE_POLICY.md")
    left = ("tokenizer.bin", "pytorch_model.bin", "model.gguf", "original/a.pth")
    left += (".cache/vocab.txt", "onnx/model.onnx", "modeling.py", "tokenizer.py", "optimizer.pt")
    for name in copied + left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    quantize_folder(source, out, windows, OPTIONS, progress=False)
    assert all((out / name).read_text() == name for name in copied)
    assert not any((out / name).exists() for name in left)


def test_a_link_to_nothing_is_refused(llama: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    (source / "chat_template.jinja").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match="chat_template.jinja: expected a file, got a link"):
        quantize_folder(source, tmp_path / "out", windows, OPTIONS, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
