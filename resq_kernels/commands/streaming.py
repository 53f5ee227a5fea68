"""Text that a model generates, printed as it comes: what `generate` and `chat` share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from resq_kernels.commands import loading
from resq_kernels.commands.arguments import at_least, real
from resq_kernels.commands.output import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache
    from transformers.generation.streamers import BaseStreamer

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


def add_sampling_arguments(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    """How many tokens, and how they are chosen."""
    parser.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=new_tokens,
        metavar="N",
        help=f"stop after N tokens (default: {new_tokens})",
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
        ids: the new tokens, the one that ended them included.
        ended: whether the last of them is an end token.
        prompt_tokens: number of tokens before them.
        prefill_seconds: until the first new token.
        decode_seconds: from the first new token to the last.
    """

    ids: list[int]
    ended: bool
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def shown(self) -> list[int]:
        """The new tokens without the end token."""
        return self.ids[:-1] if self.ended else self.ids

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else None

    def figures(self) -> dict[str, float | None]:
        """Counts and times under their keys in JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.ids),
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@contextlib.contextmanager
def text_expected(what: str) -> Iterator[None]:
    """Turns an error of text that is read inside the block into one that names `what`.

    Raises:
        UsageError: the bytes are not text.
    """
    try:
        yield
    except UnicodeError as error:
        raise UsageError(f"{what}: expected text, got bytes that are not ({error})") from None


def check_text(text: str, what: str) -> None:
    """Refuses what is not text: bytes of arguments that are not UTF-8 come as surrogates.

    Raises:
        UsageError: it is not text.
    """
    with text_expected(what):
        text.encode()


def load(args: argparse.Namespace, device: str) -> PreTrainedModel:
    """The model of MODEL, with --adapter and the ids of special tokens that its
    generation_config.json names.

    Says on stderr which other settings of that file are not used.

    Raises:
        CommandError: the model or the adapter does not load.
        CheckpointError: the file is not a JSON object.
    """
    ids = _token_ids(args.model)
    model = loading.load_model(args.model, args.dtype, device, args.lo_bits, args.adapter)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    return model


def room(tokens: int, limit: int | None, asked: int, what: str, advice: str = "") -> int:
    """New tokens that fit after a prompt; prints a note if they are fewer than asked.

    Args:
        tokens: of the prompt.
        limit: the model's positions, None if it does not say.
        asked: new tokens that were asked for.
        what, advice: begin and end the sentence of the error.

    Raises:
        UsageError: the prompt is empty, or leaves no room.
    """
    if tokens == 0:
        raise UsageError(f"{what}: expected text, got no token")
    if limit is None:
        return asked
    if tokens >= limit:
        raise UsageError(
            f"{what}: expected fewer than {limit} tokens (the model's max_position_embeddings), "
            f"got {tokens}{advice}"
        )
    if tokens + asked > limit:
        sys.stderr.write(f"resq: only {limit - tokens} positions are left after the prompt\n")
    return min(asked, limit - tokens)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    *,
    show_prompt: bool = True,
    out: TextIO | None = None,
    cache: Cache | None = None,
    stop: Callable[[], bool] | None = None,
) -> Generation:
    """Generates from ids, int64 [1, prompt], printing the text as it comes.

    Args:
        model, tokenizer: as loaded; the end tokens are those of the model's generation_config.
        ids: the prompt's tokens.
        max_new_tokens: limit; an end token stops earlier.
        temperature: 0 for greedy, above 0 samples at this temperature.
        top_p: share of the probability that is sampled from.
        show_prompt: whether the prompt is printed too.
        out: where the text goes, without special tokens and with a line end; None: nowhere.
        cache: keys and values of the first tokens of ids; afterwards of all tokens but the last.
        stop: asked after every token whether to end.
    """
    import torch
    from transformers import StoppingCriteriaList, TextStreamer

    from resq_kernels.nn.kv_cache import cache_name

    ends = end_tokens(model)

    class TimedStreamer(TextStreamer):
        """Records when each token came, and prints no end token, special or not."""

        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())
            if len(times) == 1 or int(value[-1]) not in ends:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if out is not None:
                print(text, end="\n" if stream_end else "", flush=True, file=out)

    times: list[float] = []
    options: dict[str, object] = {"do_sample": False, "top_p": None, "temperature": None}
    if temperature > 0:
        # top_k=0: the library's default of 50 would cut the distribution unasked.
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if cache is not None:
        options[cache_name(model)] = cache
    if stop is not None:
        ask = stop
        options["stopping_criteria"] = StoppingCriteriaList(
            [lambda ids, scores: torch.full((len(ids),), ask(), device=ids.device)]
        )
    ids = ids.to(model.device)
    streamer = TimedStreamer(tokenizer, skip_prompt=not show_prompt, skip_special_tokens=True)
    start = time.perf_counter()
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=_pad_token(model, tokenizer),
        **options,
        **_decoding(model, streamer),
    )[0, ids.shape[1] :].tolist()
    # The streamer is given the prompt first, then one token a step.
    first, last = times[1], times[-1]
    return Generation(tokens, tokens[-1] in ends, ids.shape[1], first - start, last - first)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, of the model's generation_config."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _token_ids(model: str) -> dict[str, object]:
    """The ids of generation_config.json; says on stderr which of its other settings are not used.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    from transformers.utils import cached_file

    from resq_kernels.safetensors_io import read_json

    if loading.is_gguf(model):
        return loading.open_gguf(model).generation
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
    """The option to decode by prepared steps, if the model supports it."""
    from resq_kernels.nn.decode_graph import unsupported_reason
    from resq_kernels.nn.generation import graph_decoding

    if unsupported_reason(model) is not None:
        return {}
    return {"custom_generate": functools.partial(graph_decoding, streamer=streamer)}


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """An id to pad with: never used with one prompt, but without it transformers warns."""
    for source in (model.generation_config.pad_token_id, tokenizer.pad_token_id):
        if source is not None:
            return source
    return tokenizer.eos_token_id
