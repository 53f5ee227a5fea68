"""Where figures are written: links are followed, devices written to, the rest refused early."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Result

from resq_kernels.commands import output


def test_a_link_is_followed(tmp_path: Path, resq: Callable[..., Result]) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "figures.json")
    for _ in range(2):  # the file is made, then replaced
        assert resq("info", "--json", link).code == 0
        assert link.is_symlink() and "versions" in json.loads(link.read_text())
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["figures.json"]


def test_a_pipe_is_written_to(tmp_path: Path, resq: Callable[..., Result]) -> None:
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text()))
    reader.start()
    assert resq("info", "--json", pipe).code == 0
    reader.join(timeout=10)
    assert "versions" in json.loads(texts[0]) and pipe.is_fifo()


def test_a_device_is_written_to(tmp_path: Path, resq: Callable[..., Result]) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    assert resq("info", "--json", link).code == 0
    assert link.is_symlink() and not Path("/dev/null").is_file()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_figures_among_what_is_printed(tmp_path: Path, name: str, to: str) -> None:
    """A stream that the shell sent to a file keeps what was printed before."""
    code = "from resq_kernels.commands import output; print('table', flush=True); "
    code += "import sys; print('note', file=sys.stderr); "
    code += f"output.check_target({name!r}); output.write_json({name!r}, {{'a': 1}}); print('end')"
    paths = [tmp_path / "out", tmp_path / "err"]
    if to == "pipe":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        texts, status = [done.stdout, done.stderr], done.returncode
    else:
        with paths[0].open("w") as out, paths[1].open("w") as err:
            status = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err).returncode
        texts = [path.read_text() for path in paths]
    figures = '{\n  "a": 1\n}\n'
    first = name == "/dev/stdout"
    assert status == 0
    assert texts == [f"table\n{figures * first}end\n", f"note\n{figures * (not first)}"]


BAD = {
    "": "expected a file, got the folder",
    ".": "expected a file, got the folder",
    "none/x.json": "none does not exist",
    "file/x.json": "Not a directory",
    "loop": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "out": "expected a file outside of",
    "out/x.json": "expected a file outside of",
    "out.partial": "expected a file outside of",
    "out.partial/x/y.json": "expected a file outside of",
    "to_out": "expected a file outside of",
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    Path("to_out").symlink_to("out/y.json")
    before = sorted(tmp_path.rglob("*"))
    options = ("--calib", text_file, "--samples", 2, "--json", name)
    result = resq("quantize", llama, "out", *options)
    assert (result.code, BAD[name] in result.sentence) == (2, True), result.err
    assert result.sentence.startswith("--json: ") and sorted(tmp_path.rglob("*")) == before


def test_a_socket_is_refused(tmp_path: Path, resq: Callable[..., Result]) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s"))
        result = resq("info", "--json", tmp_path / "s")
    assert (result.code, "expected an ordinary file" in result.sentence) == (2, True)


def test_a_folder_of_out_as_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(output.UsageError, match="expected a file outside of"):
        output.check_target(str(tmp_path / "deep"), out=tmp_path / "deep" / "er" / "out")
    output.check_target(str(tmp_path / "out.json"), out=tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_read_only_is_refused(tmp_path: Path, resq: Callable[..., Result]) -> None:
    path = tmp_path / "x.json"
    path.write_text("kept")
    path.chmod(0o444)
    result = resq("info", "--json", path)
    assert (result.code, path.read_text()) == (2, "kept")
    tmp_path.chmod(0o555)
    result = resq("info", "--json", tmp_path / "y.json")
    tmp_path.chmod(0o755)
    assert result.code == 2 and "cannot write to" in result.sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--out", ""), "--out: expected the beginning of a file's name, got ''"),
        (("--out", "folder/"), "--out: expected the beginning of a file's name, got 'folder/'"),
        (("--out", "b"), "--out: expected a file, got the folder b.md"),
        (("--out", "c"), "--out: expected an ordinary file, got c.png"),
        (("--out", "d", "--json", "./d.png"), "--json: expected another file than those of --out"),
    ],
)
def test_all_files_of_a_prefix_are_checked(
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "b.md"):
        Path(name).mkdir()
    Path("c.png").symlink_to("/dev/null")
    result = resq("bench", "hadamard", *options)
    assert (result.code, result.out) == (2, "") and result.sentence.startswith(sentence)


def test_a_prefix_of_links(
    tmp_path: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    names = ("h.json", "h.md", "h.png")
    for name in names:
        Path(name).symlink_to(f"real/{name}")
    options = (
        "--shapes",
        "llama-3.2-1b",
        "--batch",
        1,
        "--rounds",
        1,
        "--cold-mb",
        0,
        "--out",
        "h",
    )
    assert resq("bench", "hadamard", *options).code == 0
    assert all(Path(name).is_symlink() for name in names)
    assert sorted(path.name for path in Path("real").iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "source"),
    [("model/config.json", "model"), ("model/tokenizer.json", "model"), ("text.txt", "text.txt")],
)
def test_what_a_command_reads_is_not_overwritten(
    llama: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    source: str,
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text("text " * 99)
    (tmp_path / "link.json").symlink_to(name)
    before = (tmp_path / name).read_bytes()
    monkeypatch.chdir(tmp_path)
    commands = [
        ("quantize", "model", "out", "--calib", "text.txt"),
        ("eval", "model", "--text", "text.txt"),
    ]
    for command in [*commands, ("generate", "model", "--prompt", "x")][: 2 + ("/" in name)]:
        for target in (name, "link.json"):
            result = resq(*command, "--json", target)
            assert result.code == 2
            wanted = f"--json: expected another file than those of {source}, got {target}"
            assert result.sentence == wanted
    assert (tmp_path / name).read_bytes() == before


def test_figures_beside_a_model_are_replaced(
    llama: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    figures = tmp_path / "model" / "figures.json"
    for prompt in ("a", "bc"):
        command = ("generate", tmp_path / "model", "--prompt", prompt, "--max-new-tokens", 1)
        assert resq(*command, "--json", figures).code == 0
        assert json.loads(figures.read_text())["prompt_tokens"] == len(prompt) + 1


def test_a_dash_is_stdout(
    tmp_path: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = resq("info", "--json", "-")
    assert result.code == 0
    assert "versions" in json.loads(result.out[result.out.index("{\n") :])
    assert not list(tmp_path.iterdir())
