"""Recall from long contexts: sentences that are hidden in a text and asked for behind it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDLES = 8
"""Sentences in a context: one pass answers all their questions."""
SENTENCE = "\n\nThe secret number of {city} is {number}."
CITIES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Athens", "Lisbon", "Dublin"),
    *("Oslo", "Moscow", "Cairo", "Tokyo", "Sydney", "Boston", "Chicago"),
)


class Answer(NamedTuple):
    """Where a context has an answer: tokens `start` to `stop`, to the needle of this place."""

    place: int
    start: int
    stop: int


class Context(NamedTuple):
    """A text with needles, and the questions behind it, each with its right answer.

    Attributes:
        ids: int64 [length].
        tail: where the questions begin.
        answers: in the order of the questions.
    """

    ids: torch.Tensor
    tail: int
    answers: list[Answer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """What a model recalls from contexts of one length.

    Attributes:
        length: tokens of a context with its questions.
        asked: number of questions.
        found: answers that greedy decoding gives to the last digit.
        found_by_place: of those, the ones to the needles of each place, from the beginning of the
            contexts to their end.
        log_probability: mean of log p(answer), in nats.
    """

    length: int
    asked: int
    found: int
    found_by_place: list[int]
    log_probability: float


def make_contexts(
    tokenizer: PreTrainedTokenizerBase, text: torch.Tensor, length: int, count: int, seed: int = 0
) -> list[Context]:
    """Contexts of `length` tokens without BOS: pieces of the text with a needle behind each of the
    first eight, "The secret number of Paris is 48213.", then the same sentences in another order.

    Cities, numbers, order and the place in the text are random.

    Args:
        tokenizer: the model's.
        text: ids of the haystack, int64 [tokens].
        length: tokens of a context.
        count: how many contexts.
        seed: of the draws.

    Raises:
        ValueError: the text is shorter than a context, or a context is too short for its needles.
    """
    contexts = []
    for index in range(count):
        draw = random.Random(f"{seed} {length} {index}")
        cities = draw.sample(CITIES, NEEDLES)
        needles = [_needle(tokenizer, city, draw.randrange(10000, 100000)) for city in cities]
        hidden = sum(len(ids) for ids, _, _ in needles)
        room = length - 2 * hidden
        if room < NEEDLES + 1:
            raise ValueError(
                f"needle: expected contexts of at least {2 * hidden + NEEDLES + 1} tokens for "
                f"{NEEDLES} needles and their questions, got {length}"
            )
        if len(text) < room:
            raise ValueError(
                f"text: expected at least {room} tokens for contexts of {length}, got {len(text)}"
            )
        start = draw.randrange(len(text) - room + 1)
        pieces = text[start : start + room].tensor_split(NEEDLES + 1)
        parts: list[torch.Tensor] = []
        for piece, (ids, _, _) in zip(pieces[:-1], needles, strict=True):
            parts += [piece, ids]
        parts.append(pieces[-1])
        end = tail = sum(map(len, parts))
        answers = []
        for place in draw.sample(range(NEEDLES), NEEDLES):
            ids, first, last = needles[place]
            answers.append(Answer(place, end + first, end + last))
            parts.append(ids)
            end += len(ids)
        contexts.append(Context(torch.cat(parts), tail, answers))
    return contexts


def _needle(
    tokenizer: PreTrainedTokenizerBase, city: str, number: int
) -> tuple[torch.Tensor, int, int]:
    """The tokens of a sentence, and where those of its number begin and end."""

    def encode(digits: str) -> list[int]:
        sentence = SENTENCE.format(city=city, number=digits)
        found: list[int] = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        return found

    # The number is where the sentence differs from one whose number has no digit in common.
    digits = str(number)
    ids, other = encode(digits), encode("".join(str(9 - int(digit)) for digit in digits))
    first = _common(ids, other)
    last = len(ids) - _common(ids[first:][::-1], other[first:][::-1])
    return torch.tensor(ids), first, last


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def recall(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[Context],
    *,
    progress: str | None = None,
) -> dict[str, Recall]:
    """Runs models over contexts, one pass each.

    An answer is found if each of its tokens is the likeliest one behind the question, earlier
    questions and their right answers: what greedy decoding would write.

    Args:
        models: name -> a causal language model in evaluation mode.
        contexts: of one length, at least one.
        progress: label of a progress bar on stderr (shown after two seconds), or None.
    """
    found: dict[str, list[tuple[int, bool, float]]] = {name: [] for name in models}
    bar = tqdm(contexts, desc=progress, unit="context", delay=2, disable=progress is None)
    with torch.inference_mode():
        for ids, tail, answers in bar:
            for name, model in models.items():
                keep = len(ids) - tail + 1  # and the token before, which predicts the first
                logits = model(
                    ids[None].to(model.device), use_cache=False, logits_to_keep=keep
                ).logits[0]
                found[name] += [_read(logits, ids, tail - 1, answer) for answer in answers]
    return {
        name: Recall(
            length=len(contexts[0].ids),
            asked=len(read),
            found=sum(right for _, right, _ in read),
            found_by_place=[
                sum(right for place, right, _ in read if place == wanted)
                for wanted in range(NEEDLES)
            ],
            log_probability=sum(likely for *_, likely in read) / len(read),
        )
        for name, read in found.items()
    }


def _read(
    logits: torch.Tensor, ids: torch.Tensor, first: int, answer: Answer
) -> tuple[int, bool, float]:
    """Place, whether it was found, and log p; row 0 of the logits is behind token `first`."""
    rows = logits[answer.start - 1 - first : answer.stop - 1 - first].float()
    wanted = ids[answer.start : answer.stop].to(rows.device)
    log_p = functional.log_softmax(rows, -1).gather(1, wanted[:, None]).sum()
    return answer.place, bool((rows.argmax(-1) == wanted).all()), float(log_p)
