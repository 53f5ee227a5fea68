"""Recall from long contexts: the contexts, the count of right answers, and `resq eval --needle`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_support import Result, byte_tokenizer, save, tiny_llama

from resq_kernels.needle import CITIES, NEEDLES, Context, Recall, make_contexts, recall

LENGTH = 900
TEXT = torch.arange(3000) % 256


class Triples:
    """A tokenizer of words whose digits come in groups of up to three, as Llama-3's."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        found = re.findall(r"\d{1,3}|\s?[^\s\d]+|\s", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in found]}

    def decode(self, ids: Any) -> str:
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), Triples()], ids=["bytes", "triples"])
def test_contexts(tokenizer: Any) -> None:
    text = TEXT + 1000  # no token of a sentence
    contexts = make_contexts(tokenizer, text, LENGTH, 3, seed=5)
    assert len(contexts) == 3
    for ids, tail, answers in contexts:
        assert ids.shape == (LENGTH,) and ids.dtype == torch.int64
        questions = tokenizer.decode(ids[tail:])
        sentences = re.findall(r"\n\nThe secret number of (\w+) is (\d{5})\.", questions)
        assert len(dict(sentences)) == NEEDLES and set(dict(sentences)) <= set(CITIES)
        assert sorted(answer.place for answer in answers) == list(range(NEEDLES))
        starts = []
        for (city, number), (place, start, stop) in zip(sentences, answers, strict=True):
            assert tokenizer.decode(ids[start:stop]) == number
            assert tokenizer.decode(ids[tail:start]).endswith(f"number of {city} is ")
            sentence = f"\n\nThe secret number of {city} is {number}."
            needle = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            hay = ids[:tail].tolist()
            (at,) = [i for i in range(tail) if hay[i : i + len(needle)] == needle]
            starts.append((at, place))
        places = [place for _, place in sorted(starts)]
        assert places == list(range(NEEDLES))
        gaps = [b - a for (a, _), (b, _) in zip(sorted(starts), sorted(starts)[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 8  # lengths of names, and a piece's last token
    assert not torch.equal(contexts[0].ids, contexts[1].ids)
    again, other = (make_contexts(tokenizer, text, LENGTH, 3, seed=seed) for seed in (5, 6))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(contexts, again, strict=True))
    assert not torch.equal(contexts[0].ids, other[0].ids)


def test_the_haystack_is_the_text() -> None:
    ids, tail, answers = make_contexts(byte_tokenizer(), TEXT, LENGTH, 1)[0]
    text = ids[:tail].tolist()
    steps = Counter((b - a) % 256 for a, b in zip(text, text[1:], strict=False))
    needles = sum(1 for _ in answers)
    # Every step within a piece is +1; a needle joins the pieces without a gap in the text.
    assert steps[1] > tail - 60 * needles
    outside = [t for t in text if t >= 256]
    assert not outside


def test_contexts_that_cannot_be_made() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"contexts of at least \d+ tokens .* got 300"):
        make_contexts(tokenizer, TEXT, 300, 1)
    with pytest.raises(ValueError, match=r"text: expected at least \d+ tokens .* 2000, got 50"):
        make_contexts(tokenizer, TEXT[:50], 2000, 1)


class Knows:
    """A model that is sure of the right next token, but for the answers at some places."""

    device = torch.device("cpu")

    def __init__(self, context: Context, unknown: set[int], first: bool = False) -> None:
        self.context, self.wrong = context, set()
        for place, start, stop in context.answers:
            if place in unknown:
                self.wrong |= {start if first else stop - 1}

    def __call__(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert not use_cache and torch.equal(ids[0], self.context.ids)
        logits = torch.zeros(ids.shape[1], 300)
        for position in range(ids.shape[1] - 1):
            token = int(ids[0, position + 1])
            logits[position, (token + 1) % 300 if position + 1 in self.wrong else token] = 20.0
        return SimpleNamespace(logits=logits[None, -logits_to_keep:])


@pytest.mark.parametrize("first", [True, False], ids=["first digit", "last digit"])
def test_an_answer_counts_if_every_digit_is_right(first: bool) -> None:
    contexts = make_contexts(byte_tokenizer(), TEXT, LENGTH, 1)
    models = {
        "all": Knows(contexts[0], set()),
        "some": Knows(contexts[0], {0, 3, 7}, first),
        "none": Knows(contexts[0], set(range(NEEDLES)), first),
    }
    found = recall(models, contexts)
    assert found["all"].found == found["all"].asked == NEEDLES
    assert found["all"].log_probability == pytest.approx(0, abs=1e-4)
    assert found["some"].found_by_place == [0, 1, 1, 0, 1, 1, 1, 0]
    # One token of a wrong answer has 20 nats less than its rival.
    assert found["some"].log_probability == pytest.approx(-20 * 3 / 8, rel=1e-3)
    assert found["none"].found == 0 and found["none"].length == LENGTH


def test_it_is_what_greedy_decoding_gives() -> None:
    """On a model that was trained on every other answer."""
    (context,) = make_contexts(byte_tokenizer(), TEXT, LENGTH, 1)
    model = tiny_llama(max_position_embeddings=1024, num_hidden_layers=1)
    labels = torch.full_like(context.ids, -100)
    for place, start, stop in context.answers:
        if place % 2:
            labels[start:stop] = context.ids[start:stop]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        model(context.ids[None], labels=labels[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = recall({"model": model.eval()}, [context])["model"]
    right = [False] * NEEDLES
    for place, start, stop in context.answers:
        written = model.generate(
            context.ids[None, :start], max_new_tokens=stop - start, do_sample=False, eos_token_id=0
        )[0, start:]
        right[place] = torch.equal(written, context.ids[start:stop])
    assert found.found_by_place == right and found.found == sum(right) > 0
    assert not any(right[::2])


def test_eval_prints_and_writes_it(tmp_path: Path, resq: Callable[..., Result]) -> None:
    model = save(tiny_llama(max_position_embeddings=1024), tmp_path / "model")
    other = save(tiny_llama(1, max_position_embeddings=1024), tmp_path / "other")
    text, target = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("A haystack of words. " * 200)
    options = ("--seqlen", 64, "--max-windows", 1, "--needle", f"{LENGTH},1000")
    result = resq("eval", model, "--text", text, *options, "--json", target)
    assert result.code == 0, result.err
    rows = json.loads(target.read_text())["needle"]
    assert [(row["length"], row["asked"]) for row in rows] == [(LENGTH, 32), (1000, 32)]
    for row in rows:
        assert set(row) == {*Recall.__dataclass_fields__, *REFERENCE}
        assert row["reference_found"] is row["reference_log_probability"] is None
        assert row["found"] == sum(row["found_by_place"]) and row["log_probability"] < 0
        assert f"needle {row['length']}" in result.out
        assert f"{row['found']} of 32 found, log p {row['log_probability']:.2f}" in result.out
    options = (*options[:-1], LENGTH, "--needle-contexts", 1, "--reference", other)
    result = resq("eval", model, "--text", text, *options, "--json", target)
    (row,) = json.loads(target.read_text())["needle"]
    assert row["asked"] == NEEDLES and row["reference_found"] is not None
    assert f"; reference {row['reference_found']}, " in result.out


REFERENCE = {"reference_found", "reference_log_probability"}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--needle", "65"), 2, "--needle: expected at most 64 (the model's max_position"),
        (("--needle", "0"), 2, "expected different lengths of at least 1, got '0'"),
        (("--needle", "32,32"), 2, "expected different lengths of at least 1, got '32,32'"),
        (("--needle", "4k"), 2, "expected numbers of tokens separated by commas, got '4k'"),
        (("--needle-contexts", 3), 2, "--needle-contexts: needs --needle"),
        (("--needle", "64"), 1, "needle: expected contexts of at least"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, resq: Callable[..., Result], options: tuple, code: int, words: str
) -> None:
    model, text = save(tiny_llama(), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("A haystack of words. " * 200)
    result = resq("eval", model, "--text", text, *options)
    assert (result.code, words in result.sentence) == (code, True), result.err


def test_it_needs_a_text(tmp_path: Path, resq: Callable[..., Result]) -> None:
    model = save(tiny_llama(), tmp_path / "model")
    result = resq("eval", model, "--tasks", "x", "--needle", "64")
    assert result.code == 2 and "--needle: needs a text, add --text FILE" in result.sentence
