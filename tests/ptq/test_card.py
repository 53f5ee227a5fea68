"""The README.md of a quantized folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from resq_kernels.config import ResQConfig
from resq_kernels.ptq.card import source_name, write_card
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.testing.tiny_models import save_tiny_model


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    "config",
    [ResQConfig(), ResQConfig(method="quik"), ResQConfig(method="rtn", kv_bits=16)],
    ids=str,
)
def test_it_keeps_the_licence_and_says_what_it_is(tmp_path: Path, config: ResQConfig) -> None:
    source = tmp_path / "models--some--model-1B" / "snapshots" / "0123abcd"
    source.mkdir(parents=True)
    header = "license: other\nlicense_name: llama3.2\nlanguage: [en, de]\nmodel-index: [x]\n"
    (source / "README.md").write_text(f"---\n{header}---\n# Of the source\n")
    write_card(tmp_path, source, config, [("verdict", "close"), ("perplexity", "10 -> 11")])
    written = card(tmp_path)
    data = written.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "llama3.2"
    assert data["language"] == ["en", "de"] and "model-index" not in data
    assert data["base_model"] == "some/model-1B" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and "resq" in data["tags"]
    assert "# some/model-1B, quantized with ResQ" in written.text
    assert "pip install resq_kernels" in written.text and "Of the source" not in written.text
    assert ("1/8 of every dimension" in written.text) == (config.method != "rtn")
    assert f"| kv_bits | {config.kv_bits} |" in written.text
    assert "\n\n- verdict: close\n- perplexity: 10 -> 11\n\n" in written.text


@pytest.mark.parametrize("content", [None, "# No header\n", "---\na: [\n---\n", b"\xff\xfe\x00"])
def test_a_source_without_a_card_that_can_be_read(
    tmp_path: Path, content: str | bytes | None
) -> None:
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "README.md").write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    write_card(out, tmp_path, ResQConfig())
    data = card(out).data.to_dict()
    assert "license" not in data and "base_model" not in data
    assert source_name(tmp_path) == tmp_path.name


def test_a_quantized_folder_has_one(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "in", "llama", num_hidden_layers=1)
    tokens = torch.randint(0, 256, (2, 32))
    config = ResQConfig(weights="rtn")
    for name, held_out in (("without", None), ("with", tokens)):
        out = tmp_path / name
        quantize_folder(tmp_path / "in", out, tokens, config, held_out=held_out, progress=False)
        text = card(out).text
        assert "# in, quantized with ResQ" in text
        assert ("- KL to 16-bit: " in text) is (name == "with")
