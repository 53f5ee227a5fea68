"""`resq generate`: streams text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from resq_kernels.commands import chat, loading, output, streaming
from resq_kernels.commands.conversation import Conversation, check_template, opening, prompt_ids
from resq_kernels.commands.output import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "stream text from a 16-bit or quantized model"
DESCRIPTION = """\
Streams the prompt and its continuation to stdout; says the speed on stderr. With --chat, the prompt
is a message to an instruct model, and only the answer is streamed (`resq chat` goes on from there).

examples:
  resq generate out/llama-resq --prompt "The with statement is used to"
  resq generate out/llama-resq --prompt - --temperature 0.8 --seed 1 < prompt.txt
  resq generate out/smollm2-resq --chat --prompt "What is the capital of France?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq generate`."""
    loading.add_model_arguments(parser)
    loading.add_adapter_argument(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt as a message, by the tokenizer's chat template",
    )
    chat.add_system_argument(parser)
    streaming.add_sampling_arguments(parser, new_tokens=128)


def run(args: argparse.Namespace) -> None:
    """Streams, reports the speed, writes --json last.

    Raises:
        CommandError: the model cannot be used.
        UsageError: the prompt is empty, too long or not text, or --system comes without --chat.
    """
    output.check_target(args.json, reads=[args.model, args.adapter])
    if args.system is not None and not args.chat:
        raise UsageError("--system: needs --chat")
    prompt = _prompt(args.prompt)
    device = loading.choose_device(args.device)
    config = loading.load_config(args.model, args.lo_bits)
    tokenizer = loading.load_tokenizer(args.model)
    ids = _tokens(args, tokenizer, prompt)
    room = streaming.room(
        len(ids), loading.window_limit(config), args.max_new_tokens, what="--prompt"
    )
    model = streaming.load(args, device)
    import torch

    torch.manual_seed(args.seed)
    if args.chat:
        conversation = Conversation(model, tokenizer, args.system)
        turn = conversation.reply(prompt, room, args.temperature, args.top_p, out=sys.stdout)
        done, text = turn.generation, turn.assistant
    else:
        done = streaming.stream(
            model,
            tokenizer,
            torch.tensor([ids]),
            room,
            args.temperature,
            args.top_p,
            out=sys.stdout,
        )
        text = tokenizer.decode([*ids, *done.shown], skip_special_tokens=True)
        new_text = tokenizer.decode(done.shown, skip_special_tokens=True)
        if tokenizer.chat_template and not new_text.strip():
            sys.stderr.write(
                "resq: the model ended the text without a word; its tokenizer has a chat template, "
                "and an instruct model wants --chat\n"
            )
    speed = "" if done.tokens_per_second is None else f", {done.tokens_per_second:.1f} tokens/s"
    sys.stderr.write(
        f"resq: {done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s, "
        f"{len(done.ids)} new tokens{speed}\n"
    )
    said = {"model": args.model, "adapter": args.adapter, "text": text}
    output.write_json(args.json, {**said, **done.figures()})


def _tokens(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of the prompt, before a large model is loaded."""
    if not args.chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    check_template(args.model, tokenizer, args.system)
    return prompt_ids(tokenizer, [*opening(args.system), {"role": "user", "content": prompt}])


def _prompt(argument: str) -> str:
    """The argument, or what stdin holds if it is "-".

    Raises:
        UsageError: it is empty or not text.
    """
    with streaming.text_expected("--prompt"):
        prompt = sys.stdin.read() if argument == "-" else argument
    if not prompt:
        raise UsageError("--prompt: expected text, got none")
    streaming.check_text(prompt, "--prompt")
    return prompt
