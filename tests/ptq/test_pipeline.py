"""Folder in, folder out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resq_kernels.checkpoint import CheckpointReader, validate
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.pipeline import quantize_folder


@pytest.mark.parametrize("method", ["resq", "quarot", "rtn"])
@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_quantized_folder_is_complete(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, method: str, weights: str
) -> None:
    out = tmp_path / "out"
    config = ResQConfig(method=method, weights=weights, seed=3)
    report = quantize_folder(any_model, out, tokens, config, progress=False)
    stored = validate(out)
    assert (stored.method, stored.weights, stored.seed) == (method, weights, 3)
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((out / "quantization_report.json").read_text()) == report
    assert len(report["layers"]) == 14
    assert all(0 < row["error"] < 0.3 for row in report["layers"])
    assert report["bytes_after"] < report["bytes_before"]
    assert (out / "tokenizer.json").read_bytes() == (any_model / "tokenizer.json").read_bytes()
    before, after = CheckpointReader(any_model), CheckpointReader(out)
    assert after.config["tie_word_embeddings"] is False
    assert after.info("lm_head.weight").dtype == before.info("model.embed_tokens.weight").dtype
    rotated = method != "rtn"
    assert ("model.layers.1.self_attn.key_rotation" in after) == rotated
    name = "model.layers.1.input_layernorm.weight"
    gain = after.load(name)
    assert torch.equal(gain, torch.ones_like(gain) if rotated else before.load(name))
