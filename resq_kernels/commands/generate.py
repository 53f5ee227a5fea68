"""`resq generate`: streams text."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from resq_kernels.commands import loading, output
from resq_kernels.commands.arguments import at_least, real
from resq_kernels.commands.output import UsageError
from resq_kernels.safetensors_io import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

SUMMARY = "stream text from a 16-bit or quantized model"
DESCRIPTION = """\
Streams the prompt and its continuation to stdout; says the speed on stderr.

examples:
  resq generate out/llama-resq --prompt "The with statement is used to"
  resq generate out/llama-resq --prompt - --temperature 0.8 --seed 1 < prompt.txt
"""


# Of generation_config.json: the values with which a setting changes nothing in transformers.
_DEFAULTS = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "target_lookbehind": 10,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "use_cache": True,
}
_SAY_NOTHING = ("transformers_version", "_from_model_config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq generate`."""
    loading.add_model_arguments(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=128,
        metavar="N",
        help="stop after N tokens (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=real(0.0, 100.0),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default), above 0 samples",
    )
    parser.add_argument(
        "--top-p",
        type=real(0.0, 1.0, open_low=True),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P (default: 1, all)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="S", help="seed of the sampling (default: 0)"
    )


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation and its times.

    Attributes:
        text: prompt and continuation, special tokens removed.
        prompt_tokens, new_tokens: numbers of tokens.
        prefill_seconds: until the first new token.
        decode_seconds: from the first new token to the last.
        tokens_per_second: (new_tokens - 1) / decode_seconds, None with one new token.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None


def run(args: argparse.Namespace) -> None:
    """Streams, reports the speed, writes --json last.

    Raises:
        CommandError: the model cannot be used.
        UsageError: the prompt is empty, too long or not text.
    """
    output.check_target(args.json, reads=[args.model])
    prompt = _prompt(args.prompt)
    device = loading.choose_device(args.device)
    config = loading.load_config(args.model)
    tokenizer = loading.load_tokenizer(args.model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    room = _room(ids.shape[1], loading.window_limit(config), args.max_new_tokens)
    ends = _token_ids(args.model)
    model = loading.load_model(args.model, args.dtype, device)
    for name, value in ends.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(args.seed)
    done = stream(model, tokenizer, ids, room, args.temperature, args.top_p)
    speed = "" if done.tokens_per_second is None else f", {done.tokens_per_second:.1f} tokens/s"
    sys.stderr.write(
        f"resq: {done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s, "
        f"{done.new_tokens} new tokens{speed}\n"
    )
    output.write_json(args.json, {"model": args.model, **dataclasses.asdict(done)})


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Generation:
    """Generates from ids, int64 [1, prompt], printing the text as it comes.

    Args:
        model, tokenizer: as loaded.
        ids: the prompt's tokens.
        max_new_tokens: limit; an end-of-sequence token stops earlier.
        temperature: 0 for greedy, above 0 samples at this temperature.
        top_p: share of the probability that is sampled from.
    """
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        """A streamer that records when each token came."""

        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())
            super().put(value)

    times: list[float] = []
    options: dict[str, object] = {"do_sample": False, "top_p": None, "temperature": None}
    if temperature > 0:
        # top_k=0: the library's default of 50 would cut the distribution unasked.
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ids = ids.to(model.device)
    streamer = TimedStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=_pad_token(model, tokenizer),
        **options,
        **_decoding(model, streamer),
    )[0]
    # The streamer is given the prompt first, then one token a step.
    first, last = times[1], times[-1]
    new_tokens = tokens.numel() - ids.shape[1]
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=new_tokens,
        prefill_seconds=first - start,
        decode_seconds=last - first,
        tokens_per_second=(new_tokens - 1) / (last - first) if new_tokens > 1 else None,
    )


def _prompt(argument: str) -> str:
    """The argument, or what stdin holds if it is "-".

    Raises:
        UsageError: it is empty or not text.
    """
    try:
        prompt = sys.stdin.read() if argument == "-" else argument
        prompt.encode()  # bytes of an argument that are not UTF-8 come as surrogates
    except UnicodeError as error:
        raise UsageError(f"--prompt: expected text, got bytes that are not ({error})") from None
    if not prompt:
        raise UsageError("--prompt: expected text, got none")
    return prompt


def _token_ids(model: str) -> dict[str, object]:
    """The ids of generation_config.json; says on stderr which of its other settings are not used.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    from transformers.utils import cached_file

    path = cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    settings = read_json(Path(path))
    ids = {name: settings.pop(name) for name in loading.TOKEN_IDS if name in settings}
    names = sorted(
        name
        for name, value in settings.items()
        if value not in (None, [], {}, _DEFAULTS.get(name)) and name not in _SAY_NOTHING
    )
    if names:
        sys.stderr.write(f"resq: generation_config.json: not used: {', '.join(names)}\n")
    return ids


def _decoding(model: PreTrainedModel, streamer: BaseStreamer) -> dict[str, object]:
    """The option to decode with CUDA graphs, on a GPU and if the model supports it."""
    from resq_kernels.nn.decode_graph import graph_decoding, unsupported_reason

    if model.device.type != "cuda" or unsupported_reason(model) is not None:
        return {}
    return {"custom_generate": functools.partial(graph_decoding, streamer=streamer)}


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """An id to pad with: never used with one prompt, but without it transformers warns."""
    for source in (model.generation_config.pad_token_id, tokenizer.pad_token_id):
        if source is not None:
            return source
    return tokenizer.eos_token_id


def _room(prompt: int, limit: int | None, asked: int) -> int:
    """New tokens that fit after the prompt; prints a note if they are fewer than asked."""
    if prompt == 0:
        raise UsageError("--prompt: expected text, got no token")
    if limit is None:
        return asked
    if prompt >= limit:
        raise UsageError(
            f"--prompt: expected fewer than {limit} tokens (the model's max_position_embeddings), "
            f"got {prompt}"
        )
    if prompt + asked > limit:
        sys.stderr.write(f"resq: only {limit - prompt} positions are left after the prompt\n")
    return min(asked, limit - prompt)
