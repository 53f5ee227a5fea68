"""A model folder, a text file, and the program run in process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_support import Result, save, tiny_llama

from resq_kernels.cli import main


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose a factor of 10 on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT interrupts, here and in programs started here: a background job inherits that it is
    ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model folder; tests must not write into it."""
    return save(tiny_llama(), tmp_path_factory.mktemp("cli") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 characters of text with more than one byte in some of them."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(("a line of text, naïve and short\n" * 40)[:1000], encoding="utf-8")
    return path


@pytest.fixture
def resq(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `resq ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
