"""`resq chat`: a conversation in the terminal, or a line of stdin a turn."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from resq_kernels.commands import loading, output, streaming
from resq_kernels.commands.conversation import Conversation, Turn, check_template
from resq_kernels.commands.output import UsageError

SUMMARY = "talk to an instruct model, 16-bit or quantized"
DESCRIPTION = """\
A conversation by the chat template of the model's tokenizer. Answers go to stdout as they are
generated, everything else to stderr. /reset starts a new conversation, /exit or the end of the
input (Ctrl-D) ends the program; Ctrl-C ends an answer, and at the prompt the program. Where stdin
is not a terminal, each of its lines is a turn.

examples:
  resq chat out/smollm2-resq
  resq chat out/smollm2-resq --system "Answer in one sentence." --temperature 0.7 < questions.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq chat`."""
    loading.add_model_arguments(parser)
    loading.add_adapter_argument(parser)
    add_system_argument(parser)
    streaming.add_sampling_arguments(parser, new_tokens=512)


def add_system_argument(parser: argparse.ArgumentParser) -> None:
    """--system."""
    parser.add_argument(
        "--system", metavar="TEXT", help="system message (default: what the template puts there)"
    )


def run(args: argparse.Namespace) -> None:
    """Talks until the input ends; writes --json last.

    Raises:
        CommandError: the model cannot be used, or its chat template refuses the system message.
        UsageError: the input is not text, or (where it is not a terminal) a message does not fit.
    """
    output.check_target(args.json, reads=[args.model, args.adapter])
    if args.system is not None:
        streaming.check_text(args.system, "--system")
    device = loading.choose_device(args.device)
    loading.load_config(args.model, args.lo_bits)
    tokenizer = loading.load_tokenizer(args.model)
    check_template(args.model, tokenizer, args.system)
    model = streaming.load(args, device)
    import torch

    torch.manual_seed(args.seed)
    conversation = Conversation(model, tokenizer, args.system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        sys.stderr.write("resq: /reset, /exit (or Ctrl-D); Ctrl-C ends an answer\n")
    turns: list[Turn] = []
    for message in _messages(terminal):
        if message == "/reset":
            conversation.reset()
            continue
        try:
            with _sigint_stops() as stop:
                turn = conversation.reply(
                    message,
                    args.max_new_tokens,
                    args.temperature,
                    args.top_p,
                    out=sys.stdout,
                    stop=stop,
                )
        except UsageError as error:
            if not terminal:
                raise
            sys.stderr.write(f"resq: {error}\n")
            continue
        turns.append(turn)
        if turn.end != "end token":
            count = len(turn.generation.ids)
            sys.stderr.write(f"resq: the answer was cut after {count} tokens\n")
    _report(turns)
    figures = [
        {
            "user": turn.user,
            "assistant": turn.assistant,
            "end": turn.end,
            "cached_tokens": turn.cached_tokens,
            **turn.generation.figures(),
        }
        for turn in turns
    ]
    output.write_json(args.json, {"model": args.model, "adapter": args.adapter, "turns": figures})


def _messages(terminal: bool) -> Iterator[str]:
    """Lines of stdin without blank ones, up to its end or /exit.

    Raises:
        UsageError: a line is not text.
    """
    if terminal:
        import readline  # noqa: F401  input() edits lines with it
    while True:
        try:
            with streaming.text_expected("stdin"):
                line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        if not terminal and not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            streaming.check_text(line, "stdin")
            yield line


@contextmanager
def _sigint_stops() -> Iterator[Callable[[], bool]]:
    """Makes the first SIGINT end the answer and not the program; yields whether it has come.

    Nothing is raised, so that the pass in progress ends, and its keys and values are whole.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        signal.signal(signal.SIGINT, before)

    # `nohup` and background jobs ignore SIGINT, and go on doing so.
    ours = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _report(turns: list[Turn]) -> None:
    """The speed of all turns on stderr."""
    done = [turn.generation for turn in turns]
    steps, seconds = sum(len(one.ids) - 1 for one in done), sum(one.decode_seconds for one in done)
    speed = f", {steps / seconds:.1f} tokens/s" if steps else ""
    new = sum(len(one.ids) for one in done)
    sys.stderr.write(f"resq: {len(turns)} turns, {new} new tokens{speed}\n")
