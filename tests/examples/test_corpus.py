"""The corpus of the demonstration, and the model that was trained on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stdlib_corpus
import torch
from heldout_perplexity import perplexity, unigram_perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(stdlib_corpus.__file__).resolve().parent
MODEL = EXAMPLES / "tiny-llama"


def test_split_is_disjoint_and_about_one_in_twenty() -> None:
    training = stdlib_corpus.training_documents()
    heldout = stdlib_corpus.heldout_documents()
    training_names = {d.name for d in training}
    heldout_names = {d.name for d in heldout}
    assert training_names.isdisjoint(heldout_names)
    assert {d.text for d in training}.isdisjoint(d.text for d in heldout)
    total = len(training_names) + len(heldout_names)
    # 20 names per held-out one are expected; the bounds are wide as names differ by version.
    assert total / 40 < len(heldout_names) < total / 10
    assert {d.kind for d in training} == {"topic", "docs", "source"}
    assert {d.kind for d in heldout} >= {"docs", "source"}


def test_topics_of_the_two_parts_share_no_paragraph() -> None:
    topics = [d for d in stdlib_corpus.all_documents() if d.kind == "topic"]
    paragraphs = [{p.strip() for p in d.text.split("\n\n") if p.strip()} for d in topics]
    training = set().union(*(p for d, p in zip(topics, paragraphs, strict=True) if not d.heldout))
    heldout = set().union(*(p for d, p in zip(topics, paragraphs, strict=True) if d.heldout))
    assert training and training.isdisjoint(heldout)


def test_split_does_not_depend_on_the_process(tmp_path: Path) -> None:
    script = EXAMPLES / "stdlib_corpus.py"
    out = tmp_path / "nested" / "heldout.txt"
    command = [sys.executable, str(script), "--part", "heldout", "--out", str(out)]
    # Another hash seed changes the order of sets; the text must not follow it.
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert out.read_text(encoding="utf-8") == stdlib_corpus.heldout_text()
    assert [path.name for path in out.parent.iterdir()] == ["heldout.txt"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("json/decoder.py", False), ("traceback.py", True), ("topic:del", True), ("os.py", False)],
)
def test_split_rule_is_frozen(name: str, expected: bool) -> None:
    # The shipped model was trained under this rule; another one would leak held-out text.
    assert stdlib_corpus.is_heldout(name) is expected


def test_texts_have_the_asked_length_and_come_from_many_documents() -> None:
    assert len(stdlib_corpus.training_text()) > 1_000_000
    assert len(stdlib_corpus.heldout_text()) > 50_000
    for read in (stdlib_corpus.calibration_text, stdlib_corpus.heldout_text):
        text = read(40_000)
        assert 0.99 * 40_000 < len(text) <= 40_000
        assert text.count(stdlib_corpus.SEPARATOR) >= 9
    openings = [d.text[:200] for d in stdlib_corpus.heldout_documents()]
    calibration = stdlib_corpus.calibration_text(200_000)
    assert not any(opening in calibration for opening in openings)


def test_prose_repeats_add_prose_only() -> None:
    once = stdlib_corpus.training_documents()
    twice = stdlib_corpus.training_documents(prose_repeats=2)
    assert len(twice) - len(once) == sum(d.kind != "source" for d in once)


def test_clean_text() -> None:
    raw = "\ufeffa\tb  \r\nc\x0c\n\n\n\n\n\nd\n"
    assert stdlib_corpus.clean_text(raw) == "a       b\nc\n\n\nd"


def test_module_docs() -> None:
    source = '"""Top."""\nclass A(B):\n    """Doc."""\n    def f(self, x=1):\n        "Inner."\n'
    expected = "module m.a\n\nTop.\n\nclass A(B)\n    Doc.\n\ndef A.f(self, x=1)\n    Inner."
    assert stdlib_corpus.module_docs("m/a.py", source) == expected
    assert stdlib_corpus.module_docs("bad.py", "def f(:") == ""


@pytest.mark.skipif(not MODEL.is_dir(), reason="the demonstration model is not in this checkout")
class TestShippedModel:
    """The model in ``examples/tiny-llama``."""

    def test_report(self) -> None:
        report = json.loads((MODEL / "training_report.json").read_text(encoding="utf-8"))
        assert report["finished"] is True
        assert report["heldout_perplexity"] < report["unigram_perplexity"] / 3

    def test_files(self) -> None:
        assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
        assert "license: apache-2.0" in (MODEL / "README.md").read_text(encoding="utf-8")

    def test_tokenizer_round_trip(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        text = stdlib_corpus.heldout_text(4000) + "\n\tnaïve – 漢字\n"
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(tokenizer) == 2048
        assert tokenizer.eos_token_id not in ids

    def test_heldout_perplexity(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        assert model.dtype == torch.bfloat16
        model = model.float()

        def encode(text: str) -> torch.Tensor:
            return torch.tensor(tokenizer(text, verbose=False)["input_ids"])

        heldout = encode(stdlib_corpus.heldout_text(20_000))
        training = encode(stdlib_corpus.training_text(500_000))
        unigram = unigram_perplexity(training, heldout, len(tokenizer))
        assert perplexity(model, heldout) < unigram / 3
