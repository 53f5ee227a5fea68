"""A conversation by the model's own chat template; keys and values of earlier turns are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from resq_kernels.chat_template import TemplateError, end_of_turn, render, token_ids
from resq_kernels.commands import loading, streaming
from resq_kernels.commands.output import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        user: the message.
        assistant: the answer, special tokens removed.
        generation: its tokens and times.
        cached_tokens: tokens of the prompt whose keys and values were those of earlier turns.
        end: "end token", "limit" (of new tokens) or "stopped".
    """

    user: str
    assistant: str
    generation: streaming.Generation
    cached_tokens: int
    end: str


class Conversation:
    """The turns so far, and the keys and values of as many of their tokens as can be used again.

    Every turn renders all messages with the chat template and compares the tokens with those whose
    keys and values are there: only the common beginning is kept. A template that changes earlier
    messages therefore costs time and nothing else.

    Args:
        model: any causal language model; the end token of the chat template is added to the end
            tokens of its generation_config.
        tokenizer: its tokenizer, with a chat template.
        system: text of the system message; None leaves that to the template.

    Raises:
        CommandError: the tokenizer has no chat template, or it refuses the system message.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._opening = opening(system)
        ends = streaming.end_tokens(model)
        end = end_of_turn(tokenizer)
        if end is not None and end not in ends:
            model.generation_config.eos_token_id = [*ends, end]
        self._reuses = _keys_are_final(model)
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages = list(self._opening)
        self._cache: Cache | None = None
        self._cached: list[int] = []

    def reply(
        self,
        text: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        out: TextIO | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Turn:
        """Answers a message, printing the answer to `out` as it comes.

        Args:
            text: the message.
            max_new_tokens, temperature, top_p, out, stop: as `streaming.stream` takes them.

        Raises:
            UsageError: the model has no position left for an answer. As after every exception, the
                conversation is then what it was before.
            CommandError: the chat template refuses the messages.
        """
        import torch

        messages = [*self.messages, {"role": "user", "content": text}]
        ids = prompt_ids(self.tokenizer, messages)
        limit = loading.window_limit(self.model.config)
        advice = " with the earlier turns; start a new conversation (/reset)"
        max_new_tokens = streaming.room(
            len(ids), limit, max_new_tokens, "message", advice if self._cached else ""
        )
        cache, kept = self._take_cache(ids)
        done = streaming.stream(
            self.model,
            self.tokenizer,
            torch.tensor([ids]),
            max_new_tokens,
            temperature,
            top_p,
            show_prompt=False,
            out=out,
            cache=cache,
            stop=stop,
        )
        if cache is not None:
            self._cache = cache
            self._cached = (ids + done.ids)[: cache.get_seq_length()]
        answer = self.tokenizer.decode(done.shown, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        limited = len(done.ids) == max_new_tokens
        end = "end token" if done.ended else "limit" if limited else "stopped"
        return Turn(text, answer, done, kept, end)

    def _take_cache(self, ids: list[int]) -> tuple[Cache | None, int]:
        """The cache with what it holds of ids, and how many tokens that is; at least one token of
        ids is left for the pass. It is the caller's until the pass is over: one that ends in
        between leaves layers of different lengths."""
        from transformers.cache_utils import DynamicCache

        cache, self._cache = self._cache, None
        if not self._reuses:
            return None, 0
        kept = 0
        for held, wanted in zip(self._cached, ids[:-1], strict=False):
            if held != wanted:
                break
            kept += 1
        if cache is None or kept == 0:
            return DynamicCache(), 0  # quantized models put pages into it
        if kept < cache.get_seq_length():
            cache.crop(kept - cache.get_seq_length())
        return cache, kept


def opening(system: str | None) -> list[Message]:
    """The messages before the first turn."""
    return [] if system is None else [{"role": "system", "content": system}]


def check_template(model: str, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    """Refuses a tokenizer whose chat template is missing or has no place for the system message.

    Raises:
        CommandError: the template is missing (the message says what else there is), or it refuses
            or drops the system message.
    """
    if not tokenizer.chat_template:
        raise CommandError(
            f"{model}: expected a tokenizer with a chat template, got one without; a base model "
            f"continues a text: `resq generate {model} --prompt TEXT`"
        )
    messages = [*opening(system), {"role": "user", "content": "A"}]
    text = _render(tokenizer, messages)
    if system is not None and system.strip() not in text:
        raise CommandError(f"--system: the chat template of {model} has no system message")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """The tokens of messages by the chat template, with the beginning of an answer.

    Raises:
        CommandError: there is no chat template, or it refuses the messages.
    """
    # As text first: what apply_chat_template returns otherwise differs between versions.
    return token_ids(tokenizer, _render(tokenizer, messages))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    try:
        return render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        raise CommandError(str(error)) from error


def _keys_are_final(model: PreTrainedModel) -> bool:
    """Whether the keys and values of a token never depend on what follows, and can be cropped."""
    from resq_kernels.architecture import SUPPORTED
    from resq_kernels.nn.decode_graph import HOST_ROPE

    config = model.config
    if config.model_type not in SUPPORTED:
        return False
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    full = full and getattr(config, "sliding_window", None) is None  # Mistral has no layer_types
    return full and getattr(rotary, "rope_type", "default") not in HOST_ROPE
