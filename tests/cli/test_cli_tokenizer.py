"""Folders whose tokenizer is missing, in parts, or needs a package: said before the work."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Result
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from resq_kernels.commands import loading
from resq_kernels.testing.tiny_models import make_model

WANTED = "no tokenizer: expected tokenizer.json, or tokenizer.model, or vocab.json and merges.txt, "
PIECES = b"\x0a\x0b\x0a\x05hello\x15\x00\x00"
LINES = b"aGVsbG8= 0\nd29ybGQ= 1\n"
CASES = {
    "nothing": ({}, WANTED + "got none of them"),
    "no merges": ({"vocab.json": b'{"a": 0}'}, WANTED + "got no merges.txt"),
    "no vocabulary": ({"merges.txt": b"a b\n"}, WANTED + "got no vocab.json"),
    "pieces": (
        {"tokenizer.model": PIECES},
        "tokenizer.model: reading it needs `pip install sentencepiece protobuf`",
    ),
    "lines": (
        {"tokenizer.model": LINES},
        "tokenizer.model: reading it needs `pip install tiktoken`",
    ),
    "damaged": ({"tokenizer.json": b"{"}, "the tokenizer does not load: Expecting property name"),
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    make_model(request.param, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_a_tokenizer_lacks(
    bare: Path,
    text_file: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    for module in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(loading, "load_model")
    files, sentence = CASES[case]
    folder = shutil.copytree(bare, tmp_path / "model")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for command, *options in (
        ("quantize", tmp_path / "out", "--calib", text_file),
        ("eval", "--text", text_file),
        ("generate", "--prompt", "a"),
    ):
        result = resq(command, folder, *options)
        assert result.code == 1
        assert result.sentence.startswith(f"{folder}: {sentence}")
        assert not list(tmp_path.glob("out*"))


def test_a_vocabulary_in_two_files_loads(bare: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bare, tmp_path / "model")
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    tokenizer = loading.load_tokenizer(str(folder))
    assert isinstance(tokenizer, Qwen2Tokenizer) and tokenizer("abb")["input_ids"] == [2, 1]


def test_code_of_a_folder_is_refused_without_a_question(
    llama: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    entry = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["a.B", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(entry))
    result = resq("generate", folder, "--prompt", "a")
    assert result.code == 1 and "custom code" in result.sentence
    assert "[y/N]" not in result.out
