"""Learned rotations on the small Llama with planted outliers: a lower loss than random ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from demo_small import HERE, plant
from stdlib_corpus import calibration_text
from transformers import AutoTokenizer

from resq_kernels.config import ResQConfig
from resq_kernels.ptq import learn
from resq_kernels.ptq.basis import find_basis
from resq_kernels.ptq.calibrate import calibrate, windows
from resq_kernels.ptq.decoder import Rope, rope_tables
from resq_kernels.ptq.rotate import Rotation, rotate
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.turned import TurnedLayer, Turns
from resq_kernels.ptq.workspace import Workspace


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
    return windows(tokenizer, calibration_text(60_000), 8, 192).calibration


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "model"
    plant(HERE / "tiny-llama", folder, tokens)
    return folder


def mean_loss(
    model: SourceModel, rotation: Rotation, rope: Rope, config: ResQConfig, tokens: torch.Tensor
) -> float:
    """Of the next token, with rounded activations, keys and values."""
    turns = Turns.begin(rotation, torch.float32, "cpu")
    layers = [
        TurnedLayer(model, index, rotation, turns, rope, config, "cpu")
        for index in range(model.shape.layers)
    ]
    head, losses = learn._Head(model, torch.float32, "cpu"), []
    with torch.no_grad():
        for window in tokens:
            x = head.embed(window)[None]
            for layer in layers:
                x = layer.forward(x)
            losses.append(head.loss(x[0], window)[0])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("options", [{}, {"method": "quarot"}], ids=["resq", "quarot"])
def test_learning_lowers_the_loss(
    planted: Path, tokens: torch.Tensor, tmp_path: Path, options: dict[str, str]
) -> None:
    model = SourceModel(planted)
    config = ResQConfig(rotations="learned", rotation_steps=40, **options)
    rope, work = rope_tables(model.reader.config, planted, tokens.shape[1]), Workspace(tmp_path)
    basis = None
    if config.method == "resq":
        basis = find_basis(model, calibrate(model, tokens, rope, work, progress=False))
    random = rotate(basis, model.shape, config)
    learned = learn.learn(model, random, tokens, rope, config, work, progress=False)
    before, after = (mean_loss(model, r, rope, config, tokens) for r in (random, learned))
    exact = dataclasses.replace(config, lo_bits=8, kv_bits=16, activation_clip=1.0)
    least = mean_loss(model, random, rope, exact, tokens)
    assert after - least < 0.95 * (before - least)
