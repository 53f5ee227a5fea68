"""The `resq` program: parses, runs one of resq_kernels.commands, reports failures as sentences."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from resq_kernels import __version__
from resq_kernels.commands import COMMANDS, CommandError, UsageError, arguments

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_SIGNAL = 0, 1, 2, 128

EPILOG = """\
exit codes: 0 done, 1 failed (one sentence on stderr says why), 2 wrong usage, 130 interrupted.
Figures go to stdout as a table and, with --json FILE, to a file whose keys docs/cli.md lists.
"""


class _Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. Not KeyboardInterrupt itself: if one passes through `exec` (dataclasses
    are made with it), the interpreter ends by SIGINT whatever exit code `main` returns."""


class _Once(argparse._StoreAction):
    """Stores a value, and refuses a second one instead of dropping the first."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option: str | None = None,
    ) -> None:
        if option is not None and self.given:
            raise argparse.ArgumentError(self, "expected once, got it twice")
        self.given = True
        super().__call__(parser, namespace, values, option)


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors read like every other error of the program."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"resq: error: {message} (see `{self.prog} --help`)\n")
        raise SystemExit(EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; cheap, as `--help` must not import transformers."""
    parser = _Parser(
        prog="resq",
        description="Quantize Llama and Qwen2.5 models to 4 bits (weights, activations, KV cache), "
        "measure them and run them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"resq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        child = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(child)
        common = child.add_argument_group("common options")
        common.add_argument(
            "--json",
            type=arguments.file,
            metavar="FILE",
            help="also write the figures to FILE (whole or not at all); - is stdout",
        )
        common.add_argument(
            "--threads",
            type=arguments.at_least(1),
            metavar="N",
            help="CPU threads (default: torch's choice)",
        )
        common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: arguments without the program's name; those of the process when None.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse exits with 0 after --help, with 2 after errors
        return int(stop.code or 0)
    args.argv = list(argv)  # reports say with which command they were made
    stopped: list[int] = []
    try:
        with _signals_unwind(stopped), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if args.threads:
                import torch

                torch.set_num_threads(args.threads)
            COMMANDS[args.command].run(args)
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`resq info | head -1`); the interpreter must not flush into the
        # closed pipe again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        if stopped:
            word = "interrupted" if stopped[-1] == signal.SIGINT else "terminated"
            sys.stderr.write(f"\nresq: {word}\n")
            return EXIT_SIGNAL + stopped[-1]
        sys.stderr.write(f"resq: error: {_sentence(error)}\n")
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    return EXIT_OK


def _show_warning(message: Warning | str, *rest: object, **more: object) -> None:
    """A warning as one line, without the place in the source."""
    sys.stderr.write(f"resq: warning: {' '.join(str(message).split())}\n")


def _sentence(error: BaseException) -> str:
    """One line that says what was wrong; exceptions without a sentence of their own are named."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = f"not enough memory {text}".rstrip()
    expected = (CommandError, ValueError, RuntimeError, OSError, ImportError, MemoryError)
    if not text or not isinstance(error, expected) or isinstance(error, NotImplementedError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text


@contextmanager
def _signals_unwind(stopped: list[int]) -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise while a command runs, so that temporary files are removed.

    `stopped` tells main which signal came. The exception cannot: libraries catch what is raised
    inside their calls, and an interrupted quantization was seen to end with another type.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)
        raise _Stopped

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            # `nohup` and background jobs ignore SIGINT, and go on doing so.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
