"""`resq quantize`: what it says of its source, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import Result, save, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

WEIGHTS = "model.safetensors"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_head_under_a_flag_that_says_tied_is_a_warning(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    edit(folder, tie_word_embeddings=True)
    options = ("--calib", text_file, "--samples", 2, "--weights", "rtn")
    result = resq("quantize", folder, tmp_path / "out", *options)
    assert result.code == 0, result.err
    (warning,) = [line for line in result.err.splitlines() if "warning" in line]
    assert warning.startswith(f"resq: warning: {folder}: config.json says tie_word_embeddings, but")
    assert {"lm_head.weight_hi", "model.embed_tokens.weight_hi"} <= set(
        load_file(tmp_path / "out" / WEIGHTS)
    )


def classifier(folder: Path) -> None:
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(folder)


def codes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / WEIGHTS)


SOURCES = {
    "classifier": (classifier, "score.weight: expected only the tensors of a language model"),
    "codes": (codes, "mlp.up_proj.weight: expected bfloat16 or float16 or float32 [192, 128], got"),
    "custom code": (
        lambda f: edit(f, auto_map={"AutoConfig": "a.B"}),
        "auto_map: expected a model",
    ),
    "window": (lambda f: edit(f, sliding_window=8), "sliding_window: expected None, got 8"),
    "odd": (
        lambda f: edit(f, intermediate_size=251),
        "intermediate_size: expected an even number (4-bit codes are stored in pairs), got 251",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_is_refused_before_anything_is_written(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result], case: str
) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    change, words = SOURCES[case]
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    options = ("--calib", text_file, "--method", "rtn", "--samples", 2)
    result = resq("quantize", folder, tmp_path / "out", *options)
    assert result.code == 1 and sorted(tmp_path.rglob("*")) == before
    assert words in result.sentence and str(folder) in result.sentence


def test_a_share_that_the_method_does_not_have_is_not_dropped(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    options = ("--calib", text_file, "--method", "quarot", "--high-fraction", 0.125)
    result = resq("quantize", llama, tmp_path / "out", *options)
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert "method 'quarot' is uniform 4-bit, expected 0, got 0.125" in result.sentence
