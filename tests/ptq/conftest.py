"""Tiny models, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptq_models import MODELS

from resq_kernels.testing.tiny_models import save_tiny_model

# Matrices here are too small to share among threads; on a busy machine threads cost 10x.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=MODELS)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of MODELS in turn."""
    return save_tiny_model(tmp_path_factory.mktemp("any") / "model", **MODELS[request.param])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with grouped heads."""
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", **MODELS["llama"])


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bfloat16 Qwen2 folder in several shards."""
    folder = tmp_path_factory.mktemp("qwen2") / "model"
    return save_tiny_model(folder, **MODELS["qwen2-tied-bf16"])


@pytest.fixture
def tokens() -> torch.Tensor:
    """Four windows of 48 tokens."""
    return torch.randint(0, 256, (4, 48))
