"""The embedding and the head: in 8 bits, tied and not, and in the source's 16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptq_models import MODELS
from transformers import AutoModelForCausalLM

from resq_kernels import architecture
from resq_kernels.config import ResQConfig
from resq_kernels.ptq import embedding
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.rotate import rotate
from resq_kernels.ptq.source import SourceModel
from resq_kernels.safetensors_io import CheckpointReader
from resq_kernels.testing.tiny_models import save_tiny_model

QUAROT, RTN = ResQConfig(method="quarot"), ResQConfig(method="rtn")
LOW, HIGH, SCALE = (f"model.embed_tokens.weight_{part}" for part in ("lo", "hi", "scale"))


@pytest.fixture(params=["llama", "llama-tied-rope", "qwen2-tied-bf16"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> SourceModel:
    return SourceModel(save_tiny_model(tmp_path / "model", **MODELS[request.param]))


def exact(model: SourceModel, name: str, config: ResQConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix after the rotation, float64, and the gain of the final norm."""
    rotation, gain = rotate(None, model.shape, QUAROT), model.load(architecture.FINAL_NORM).double()
    rows = model.load(name).double()
    return (rows @ rotation.hidden if config.rotates else rows), gain


@pytest.mark.parametrize("config", [QUAROT, RTN], ids=["quarot", "rtn"])
def test_codes_are_the_nearest_of_the_rotated_rows(model: SourceModel, config: ResQConfig) -> None:
    rotation = rotate(None, model.shape, config) if config.rotates else None
    tensors = embedding.embedding_tensors(model, rotation, config)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        LOW: (model.shape.vocab, 0),
        HIGH: (model.shape.vocab, model.shape.hidden),
        SCALE: (model.shape.vocab, 2),
    }
    rows, scale = exact(model, architecture.EMBEDDING, config)[0], tensors[SCALE][:, 1:].double()
    error = (rows - scale * tensors[HIGH]).abs() / scale
    # Half a step, and the rounding of rows to float32 before: up to 128 codes times 2^-24.
    assert float(error.max()) <= 0.5 + 1e-4
    assert torch.equal(tensors[HIGH].abs().amax(1), torch.full((model.shape.vocab,), 127).char())


def test_calibration_sees_the_rounded_embedding(model: SourceModel) -> None:
    tokens = torch.randint(0, model.shape.vocab, (3, 20))
    rotation = rotate(None, model.shape, QUAROT)
    tensors = embedding.embedding_tensors(model, rotation, QUAROT)
    rows = (tensors[SCALE][:, 1:] * tensors[HIGH])[tokens]
    assert torch.equal(embedding.embed(model, rotation, tokens, QUAROT), rows)
    whole = ResQConfig(method="quarot", embedding_bits=16)
    (matrix,) = embedding.embedding_tensors(model, rotation, whole).values()
    assert matrix.dtype == model.reader.info(architecture.EMBEDDING).dtype
    assert torch.equal(embedding.embed(model, rotation, tokens, whole), matrix[tokens].float())


def test_the_gain_turns_the_embedding_into_the_head(model: SourceModel) -> None:
    """(E U) G = E diag(g) U, which an untied head stores."""
    rotation = rotate(None, model.shape, QUAROT)
    tensors = embedding.head_tensors(model, rotation, QUAROT)
    if not model.shape.tied:
        assert sorted(tensors) == [f"lm_head.weight_{part}" for part in ("hi", "lo", "scale")]
        return
    rows, gain = exact(model, architecture.EMBEDDING, QUAROT)
    head = (model.load(architecture.EMBEDDING).double() * gain) @ rotation.hidden
    turned = rows @ tensors["lm_head.gain"].double()
    # Every element of G is rounded once, which adds up as in a random walk.
    unit = 2.0**-8 if tensors["lm_head.gain"].dtype == torch.bfloat16 else 2.0**-23
    assert float((turned - head).norm() / head.norm()) < unit
    without = (rows - head).norm() / head.norm()
    assert float(without) > 10 * unit  # the gains of tiny models are 1 up to a fifth
    assert embedding.head_tensors(model, None, RTN) == {}


@pytest.mark.parametrize("name", ["llama", "llama-tied-rope", "qwen2-tied-bf16"])
@pytest.mark.parametrize("method", ["resq", "rtn"])
def test_eight_bits_cost_a_fraction_of_what_the_rest_costs(
    tmp_path: Path, name: str, method: str
) -> None:
    """The quantized model with a vocabulary in 8 bits is about as near to the source as with 16.

    Relative errors of the logits: 0.05 to 0.10 with 16 bits, times 0.97 to 1.16 with 8: another
    draw of the same rounding noise, and the vocabulary's own of 0.01. Without the gains of the last
    norm it would be 0.2.
    """
    source = save_tiny_model(tmp_path / "source", **MODELS[name])
    ids, logits = torch.randint(0, 256, (2, 48)), {}
    for bits in (8, 16):
        config = ResQConfig(
            method=method, weights="rtn", embedding_bits=bits, kv_bits=16, lo_bits=8
        )
        out = tmp_path / f"out-{bits}"
        quantize_folder(source, out, torch.randint(0, 256, (4, 48)), config, progress=False)
        quantized = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            logits[bits] = quantized(ids).logits
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    errors = {bits: float((y - exact).norm() / exact.norm()) for bits, y in logits.items()}
    assert errors[8] < 1.3 * errors[16], errors


def test_a_tied_vocabulary_is_stored_once(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", **MODELS["qwen2-tied-bf16"])
    tokens = torch.randint(0, 256, (2, 32))
    sizes = {}
    for bits in (8, 16):
        out = tmp_path / f"out-{bits}"
        config = ResQConfig(weights="rtn", embedding_bits=bits)
        quantize_folder(source, out, tokens, config, progress=False)
        tensors = CheckpointReader(out).tensors
        sizes[bits] = sum(
            info.dtype.itemsize * torch.Size(info.shape).numel()
            for name, info in tensors.items()
            if name.startswith(("model.embed_tokens.", "lm_head."))
        )
    vocab, hidden = 320, 128
    # What belongs to the embedding: rotation and gain, and what the bases of the linears take:
    # gains of norms, key factors, U_B, factors and order of the intermediate channels.
    basis = 2 * (hidden**2 + hidden)
    basis += 4 * 2 * (2 * hidden + 64 // 2 + 64**2 + 2 * 192)  # of two layers, float32
    assert sizes == {
        8: vocab * (hidden + 8) + 2 * hidden**2 + basis,
        16: 2 * 2 * vocab * hidden + basis,
    }
