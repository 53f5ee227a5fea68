"""Tiny source models by name: arguments of `tiny_models.save_tiny_model`; one large shape."""

from __future__ import annotations

import torch

from resq_kernels.architecture import ModelShape

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS = {
    "llama": {"model_type": "llama"},
    "llama-mha-128": {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 4},
    "llama-tied-rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 512},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied-bf16": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
        "max_shard_size": "150KB",
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied-bf16-128": {
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    },
    "smollm3": {"model_type": "smollm3", "mlp_bias": True},
}

LLAMA_3_70B = ModelShape(
    model_type="llama",
    layers=80,
    hidden=8192,
    intermediate=28672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
    biased=(),
    norm_eps=1e-5,
)
