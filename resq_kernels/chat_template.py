"""A tokenizer's chat template: its text around messages, and the tokens that begin and end them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"
"""For templates that name one, Llama-3's: with today's, the same model would give other tokens
tomorrow. It is what those templates say where there is no clock."""


class TemplateError(ValueError):
    """The template is missing, or refuses the messages."""


@dataclass(frozen=True)
class Between:
    """What a template puts between the end of a message and the next one.

    Attributes:
        ends: any one of them ends the message.
        following: the tokens that then come.
    """

    ends: tuple[int, ...]
    following: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """The tokens around the messages of a conversation.

    Attributes:
        start: what stands before the first question.
        between: after a question and after an answer, by turns. A template that ends a question by
            no token of its own, as Llama-2's by "[/INST]", has one, after an answer.
    """

    start: tuple[int, ...]
    between: tuple[Between, ...]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool,
    **values: Any,
) -> str:
    """Messages as the template writes them.

    Args:
        tokenizer: with a chat template.
        messages: "role" and "content" of each.
        add_generation_prompt: whether the beginning of an answer follows.
        values: what the template knows by name besides.

    Raises:
        TemplateError: there is none, or it refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **values
        )
    except Exception as error:  # templates raise what they like
        text = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(f"the chat template refuses the messages: {text}") from error
    return str(text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the template puts behind an answer, None if it puts none there.

    Raises:
        TemplateError: there is no template, or it refuses a question with an answer.
    """
    answer = "An answer."
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": answer}]
    text = render(tokenizer, messages, add_generation_prompt=False)
    if answer not in text:
        return None
    tail = token_ids(tokenizer, text.rsplit(answer, 1)[1])
    at = _first_mark(tokenizer, tail)
    return None if at is None else tail[at]


def read_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokens of a tokenizer's template.

    Raises:
        TemplateError: there is no template, or it does not write a question, an answer and a
            question with something before the first and a special token behind the answer.
    """
    if not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template")
    words = ["FIRSTQUESTION", "FIRSTANSWER", "SECONDQUESTION"]
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": word} for r, word in zip(roles, words, strict=True)]
    asked, whole = (
        render(tokenizer, messages[:count], add_generation_prompt=count == 1, date_string=DATE)
        for count in (1, 3)
    )
    if asked.count(words[0]) != 1 or any(whole.count(word) != 1 for word in words):
        raise TemplateError("the chat template does not write every message once")
    start, after_question = asked.split(words[0])
    after_answer = whole.split(words[1])[1].split(words[2])[0]
    question, answer = (_between(tokenizer, text) for text in (after_question, after_answer))
    if not start or answer is None:
        raise TemplateError(
            "the chat template has nothing before a question, or no special token behind an answer"
        )
    between = (answer,) if question is None else (question, answer)
    return Template(tuple(token_ids(tokenizer, start)), between)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that holds its special tokens itself."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _between(tokenizer: PreTrainedTokenizerBase, text: str) -> Between | None:
    """What stands between two messages, None if no special token ends the first."""
    ids = token_ids(tokenizer, text)
    at = _first_mark(tokenizer, ids)
    if at is None:
        return None
    ends = {ids[at], tokenizer.eos_token_id} - {None}
    return Between(tuple(sorted(ends)), tuple(ids[at + 1 :]))


def _first_mark(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """The place of the first special or added token."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return next((at for at, token in enumerate(ids) if token in special), None)
