"""`resq generate`: the same tokens as the library's own greedy search, streamed and timed."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import POSITIONS, Result, byte_tokenizer, tiny_llama
from transformers import GenerationConfig

from resq_kernels.commands import streaming

KEYS = {
    "model",
    "adapter",
    "text",
    "prompt_tokens",
    "new_tokens",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
}


def greedy(prompt: str, new_tokens: int) -> str:
    """Prompt and continuation, one full forward pass per token."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_generate_is_greedy_and_writes_the_documented_keys(
    llama: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    target = tmp_path / "out.json"
    result = resq("generate", llama, "--prompt", "def f", "--max-new-tokens", 12, "--json", target)
    assert result.code == 0
    figures = json.loads(target.read_text())
    assert set(figures) == KEYS
    assert figures["text"] == greedy("def f", 12)
    assert result.out == figures["text"] + "\n"
    prompt = len(byte_tokenizer()("def f")["input_ids"])
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (prompt, 12)
    assert f"{prompt} prompt tokens" in result.err and "tokens/s" in result.err
    expected = 11 / figures["decode_seconds"]
    assert figures["tokens_per_second"] == pytest.approx(expected)


def test_sampling_follows_the_seed(llama: Path, resq: Callable[..., Result]) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 1.5, "--seed", seed, "--max-new-tokens", 16)
        return resq("generate", llama, "--prompt", "x", *options).out

    assert text(1) == text(1)
    assert text(1) != text(2)
    almost_greedy = resq(
        "generate", llama, "--prompt", "x", "--temperature", 1.0, "--top-p", 1e-9,
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert almost_greedy.out == greedy("x", 8) + "\n"


def test_prompt_from_stdin(
    llama: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    result = resq("generate", llama, "--prompt", "-", "--max-new-tokens", 1)
    assert (result.code, result.out.startswith("abc")) == (0, True)


def test_generation_stops_at_the_last_position(llama: Path, resq: Callable[..., Result]) -> None:
    prompt = "y" * (POSITIONS - 4)
    room = POSITIONS - len(byte_tokenizer()(prompt)["input_ids"])
    result = resq("generate", llama, "--prompt", prompt, "--max-new-tokens", 50)
    assert result.code == 0
    assert f"only {room} positions are left" in result.err
    result = resq("generate", llama, "--prompt", "y" * POSITIONS)
    assert result.code == 2
    assert f"--prompt: expected fewer than {POSITIONS} tokens" in result.sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--prompt", "x", "--temperature", "-1"), "expected a number in [0, 100], got '-1'"),
        (("--prompt", "x", "--temperature", "nan"), "expected a number in [0, 100], got 'nan'"),
        (("--prompt", "x", "--top-p", "0"), "expected a number in (0, 1], got '0'"),
        (("--prompt", "x", "--max-new-tokens", "0"), "at least 1, got '0'"),
        ((), "the following arguments are required: --prompt"),
    ],
)
def test_wrong_values_are_usage_errors(
    llama: Path, resq: Callable[..., Result], options: tuple[str, ...], sentence: str
) -> None:
    result = resq("generate", llama, *options)
    assert result.code == 2
    assert sentence in result.sentence


def test_empty_prompt_is_refused(llama: Path, resq: Callable[..., Result]) -> None:
    result = resq("generate", llama, "--prompt", "")
    assert (result.code, result.sentence) == (2, "--prompt: expected text, got none")


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"stop_strings": ["def"], "max_length": 3},
        {"cache_implementation": "static", "prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"temperature": 0.6, "repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[100]], "suppress_tokens": [101]},
    ],
)
def test_settings_of_the_folder_that_are_not_used_are_named(
    llama: Path, tmp_path: Path, resq: Callable[..., Result], setting: dict[str, object]
) -> None:
    folder, target = tmp_path / "model", tmp_path / "out.json"
    shutil.copytree(llama, folder)
    ids = {"eos_token_id": 256, "pad_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(ids | setting))
    result = resq("generate", folder, "--prompt", "def f", "--max-new-tokens", 8, "--json", target)
    assert result.code == 0, result.err
    assert json.loads(target.read_text())["text"] == greedy("def f", 8)
    assert f"generation_config.json: not used: {', '.join(sorted(setting))}\n" in result.err


def test_settings_that_hold_their_default_are_not_named(
    llama: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    """Those of transformers, as far as its version has them, and none of ours beside them."""
    defaults = GenerationConfig._get_default_generation_params()
    assert (
        streaming._DEFAULTS.items() >= {k: v for k, v in defaults.items() if v is not None}.items()
    )
    folder = shutil.copytree(llama, tmp_path / "model")
    settings = {"eos_token_id": 256, "transformers_version": "4.40.0", "bad_words_ids": None}
    settings |= {"suppress_tokens": [], "_from_model_config": True} | streaming._DEFAULTS
    (folder / "generation_config.json").write_text(json.dumps(settings))
    result = resq("generate", folder, "--prompt", "def f", "--max-new-tokens", 2)
    assert result.code == 0 and "not used" not in result.err
    assert result.out == greedy("def f", 2) + "\n"


@pytest.mark.parametrize("content", ["{", "[]", '{"do_sample": false, "temperature": 0.6}'])
def test_generation_settings_do_not_stop_other_commands(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result], content: str
) -> None:
    folder, out = shutil.copytree(llama, tmp_path / "model"), tmp_path / "out"
    (folder / "generation_config.json").write_text(content)
    expected = resq("eval", llama, "--text", text_file, "--json", tmp_path / "a.json")
    found = resq("eval", folder, "--text", text_file, "--json", tmp_path / "b.json")
    assert (expected.code, found.code) == (0, 0), found.err
    a, b = (
        json.loads((tmp_path / name).read_text())["perplexity"] for name in ("a.json", "b.json")
    )
    assert a == b
    options = ("--calib", text_file, "--samples", 2, "--method", "rtn", "--weights", "rtn")
    assert resq("quantize", folder, out, *options).code == 0
    assert (out / "generation_config.json").read_text() == content
    assert resq("eval", out, "--text", text_file).code == 0
    result = resq("generate", out, "--prompt", "a", "--max-new-tokens", 2)
    assert result.code == (0 if content.endswith("0.6}") else 1)


@pytest.mark.parametrize("prompt", ["-", "\udcff"])
def test_a_prompt_that_is_not_text_is_refused(
    llama: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    result = resq("generate", llama, "--prompt", prompt)
    assert result.code == 2
    assert result.sentence.startswith("--prompt: expected text, got bytes that are not (")
