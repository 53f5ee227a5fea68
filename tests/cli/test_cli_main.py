"""The program itself: help, exit codes, one sentence per failure, whole files or none."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import Result

from resq_kernels import _library, cli
from resq_kernels.bench import cuda_timing
from resq_kernels.commands import COMMANDS, loading, output

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_and_every_option(resq: Callable[..., Result]) -> None:
    result = resq("--help")
    assert result.code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(command.SUMMARY[:30])}", result.out, re.M)
        text = resq(name, "--help").out
        for option in ("--json FILE", "--threads N", "--debug"):
            assert option in text
        if name == "bench":
            assert f"cuda {cuda_timing.COLD_BYTES >> 20})" in " ".join(text.split())
        assert "examples:" in text


def test_every_option_has_a_help_text() -> None:
    subparsers = cli.build_parser()._subparsers._group_actions[0].choices
    assert set(subparsers) == set(COMMANDS)
    for name, parser in subparsers.items():
        missing = [action.dest for action in parser._actions if not action.help]
        assert not missing, (name, missing)


def test_every_key_and_command_is_documented() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    for name in COMMANDS:
        assert f"## resq {name}" in text


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("info", "--what"), ("eval",)])
def test_wrong_usage_is_one_line_and_code_2(
    resq: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = resq(*arguments)
    assert result.code == 2
    assert result.sentence and "--help" in result.sentence
    assert len(result.err.splitlines()) == 1


def test_version_and_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resq_kernels", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "resq 0.1.0\n", "")


SLOW = ("torch", "numpy", "transformers", "safetensors", "tqdm", "matplotlib", "uvicorn", "fastapi")


def test_help_and_usage_errors_import_nothing_slow() -> None:
    """Through the script `resq`: torch alone takes a second."""
    code = (
        "import json, sys, resq_kernels_program as program\n"
        "from resq_kernels.commands import COMMANDS\n"
        "lines = [['--help'], ['--version'], ['eval'], ['info', '--what'], ['frobnicate']]\n"
        "for line in [*lines, *([name, '--help'] for name in COMMANDS)]:\n"
        "    sys.argv = ['resq', *line]\n"
        "    code = program.main()\n"
        "    assert code == (0 if line[-1] in ('--help', '--version') else 2), (line, code)\n"
        f"print(json.dumps([name for name in {SLOW} if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_module_entry_is_as_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resq_kernels", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines()}
    assert "resq_kernels.cli" in imported and imported.isdisjoint(SLOW)


@pytest.mark.parametrize(
    "code",
    [
        "import resq_kernels, torch",
        # In the script `resq` the package leaves it to what a command runs.
        "import resq_kernels_program, resq_kernels.cli as c; c.main(['info']); import torch",
        "import resq_kernels_program, resq_kernels.bench.device, torch",
        "import resq_kernels_program, resq_kernels as resq, torch; resq.ResQLinear",
    ],
)
def test_the_operators_are_registered_for_who_calls_them(code: str) -> None:
    code += "; assert hasattr(torch.ops.resq, 'mixed_gemm')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["eval", "generate", "info", "serve"])
def test_models_that_are_none_are_refused_in_a_sentence(
    tmp_path: Path, resq: Callable[..., Result], command: str
) -> None:
    if command == "serve":
        pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    options = ("--prompt", "x") if command == "generate" else ()
    missing = tmp_path / "missing"
    result = resq(command, missing, *options)
    assert (result.code, result.sentence) == (1, f"{missing}: there is no such folder")
    result = resq(command, tmp_path, *options)
    assert result.code == 1
    assert result.sentence.endswith("not a Hugging Face model folder (no config.json)")
    a_file = tmp_path / "file"
    a_file.write_text("x")
    assert "expected a model folder, got a file" in resq(command, a_file, *options).sentence
    for content, sentence in (("{", "expected JSON, got"), ("[]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(content)
        result = resq(command, tmp_path, *options)
        assert result.code == 1
        assert sentence in result.sentence


def test_hub_name_that_cannot_be_had_is_a_sentence(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, trust_remote_code: bool) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    result = resq("info", "nobody/nothing")
    assert result.code == 1
    assert "looking for it on the Hugging Face hub" in result.err
    assert result.sentence == (
        "nobody/nothing: neither a folder nor a model on the hub (We couldn't connect to the hub)"
    )


def test_debug_shows_the_traceback(tmp_path: Path, resq: Callable[..., Result]) -> None:
    result = resq("info", tmp_path, "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("resq: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(
    llama: Path, text_file: Path, resq: Callable[..., Result]
) -> None:
    result = resq("eval", llama, "--text", text_file, "--device", "cuda")
    assert result.code == 1
    assert result.sentence.startswith("--device cuda: torch sees no CUDA device")


@pytest.mark.parametrize("works", [False, True])
@pytest.mark.parametrize("missing", ["", "not built"])
def test_every_command_runs_on_the_gpu_where_its_kernels_run(
    monkeypatch: pytest.MonkeyPatch, works: bool, missing: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(_library, "CUDA_MISSING", missing)
    best = "cuda" if works and not missing else "cpu"
    assert (loading.choose_device(None), loading.choose_device("cpu")) == (best, "cpu")
    for arguments in (["quantize", "m", "o"], ["eval", "m"], ["generate", "m", "--prompt", "x"]):
        assert cli.build_parser().parse_args(arguments).device is None


def test_json_target_is_checked_before_any_work(
    tmp_path: Path, resq: Callable[..., Result]
) -> None:
    missing = tmp_path / "missing" / "x.json"
    result = resq("info", "--json", missing)
    assert (result.code, result.out) == (2, "")
    assert "does not exist" in result.sentence


def test_threads_are_set(resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert resq("info", "--threads", 3).code == 0
    assert asked[0] == 3
    assert resq("info", "--threads", 0).code == 2


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    output.write_json(str(target), {"a": 1, "nan": float("nan"), "list": [float("inf"), 2.5]})
    assert json.loads(target.read_text()) == {"a": 1, "nan": None, "list": [None, 2.5]}
    with pytest.raises(TypeError):
        output.write_json(str(target), {"a": object()})
    assert json.loads(target.read_text())["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_unexpected_failure_names_its_type(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(args: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(COMMANDS["info"], "run", broken)
    result = resq("info")
    assert (result.code, result.sentence) == (1, "KeyError: 'lost' (--debug shows where)")


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code_and_without_files(
    llama: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words of a long text\n" * 10_000)
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "resq_kernels", "eval", str(llama), "--text", str(text)]
        + ["--seqlen", "8", "--threads", "1", "--json", str(tmp_path / "out" / "eval.json")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    # The progress bar's first character says that the work has begun.
    assert process.stderr.read(1) != b""
    process.send_signal(signum)
    errors = process.stderr.read().decode()
    assert process.wait(timeout=60) == code
    assert "Traceback" not in errors
    assert errors.rstrip().splitlines()[-1] in ("resq: interrupted", "resq: terminated")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("sigint")
def test_interrupt_that_native_code_disguises_is_still_an_interrupt(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disguised(args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("error in a callback") from None

    monkeypatch.setattr(COMMANDS["info"], "run", disguised)
    before = signal.getsignal(signal.SIGINT)
    result = resq("info")
    assert (result.code, result.err) == (130, "\nresq: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_closed_pipe_is_silent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "resq_kernels", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_table_aligns_figures_to_the_right() -> None:
    text = output.table([["a", "1.5"], ["bcd", "10.25"]], header=["name", "value"])
    assert text.splitlines() == ["name  value", "----  -----", "a       1.5", "bcd   10.25"]
    assert output.table([["a", "1"], ["bcd", "22"]]) == "a    1\nbcd  22"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1536000, "1.54 MB"), (2e12, "2 TB")]
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize("option", ["--calib", "--samples", "--json"])
def test_an_option_given_twice_is_refused(resq: Callable[..., Result], option: str) -> None:
    result = resq("quantize", "model", "out", option, "128", option, "128")
    assert result.code == 2
    wanted = f"argument {option}: expected once, got it twice (see `resq quantize --help`)"
    assert result.sentence == wanted


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_of_exec_ends_with_its_code(signum: int, code: int) -> None:
    stop = f"import os, time; os.kill(os.getpid(), {int(signum)}); time.sleep(9)"
    program = (
        "import sys; from resq_kernels import cli\n"
        f"cli.COMMANDS['info'].run = lambda args: exec({stop!r})\n"
        "sys.exit(cli.main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("eval", "MODEL", "--text", ""), "--text: expected the name of a file, got ''"),
        (
            ("eval", "MODEL", "--text", "TEXT", "--seqlen", "8", "--reference", ""),
            "model: expected a folder or a hub name, got ''",
        ),
        (
            ("quantize", "MODEL", "out", "--calib", ""),
            "--calib: expected the name of a file, got ''",
        ),
        (("generate", "", "--prompt", "x"), "model: expected a folder or a hub name, got ''"),
    ],
)
def test_an_empty_name_stands_for_nothing_else(
    llama: Path,
    text_file: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(llama)
    monkeypatch.setenv("RESQ_WIKITEXT2", str(text_file.parent))
    names = {"MODEL": str(llama), "TEXT": str(text_file)}
    result = resq(*(names.get(argument, argument) for argument in arguments))
    assert (result.code, result.sentence) == (1, sentence)


def test_a_full_disk_is_said_without_a_number() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cli._sentence(full) == "No space left on device"
    full.filename = "out/model"
    assert cli._sentence(full) == "out/model: No space left on device"
