"""Tiny models, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resq_kernels.testing.tiny_models import save_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Matrices here are too small to share among threads; on a busy machine threads cost 10x.
torch.set_num_threads(1)

MODELS = {
    "llama": {"model_type": "llama"},
    "llama-mha-128": {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 4},
    "llama-tied-rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied-bf16": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
        "max_shard_size": "150KB",
    },
}


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
