"""Small random models and folders that a test can quantize in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_tokenizer() -> Any:
    """A byte-level tokenizer of 257 entries: one per byte, and `<|endoftext|>` with id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


# Llama-3.2's.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_model(model_type: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A randomly initialised float32 model: 2 layers, hidden 128, 4 query and 2 kv heads of 64.

    Weights are scaled so that attention is not uniform, norm gains and biases are random, and a
    few channels of the residual stream are larger than the rest, as in a trained model.

    Args:
        model_type: one of `architecture.SUPPORTED`. "qwen2" has q, k and v biases, and 2 query
            heads and 1 kv head, whose size is hidden size / heads; "smollm3" has no RoPE in its
            second layer.
        seed: seed of the weights.
        options: fields of the transformers configuration that replace the defaults.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    if model_type == "qwen2":
        settings["num_attention_heads"], settings["num_key_value_heads"] = 2, 1
    else:
        settings["head_dim"] = 64
    if model_type == "mistral":
        settings["sliding_window"] = None
    if model_type == "smollm3":
        settings["no_rope_layer_interval"] = 2
    settings.update(options)
    config = AutoConfig.for_model(model_type, **settings)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    loud = torch.ones(config.hidden_size)
    loud[torch.randperm(config.hidden_size, generator=generator)[:3]] = 8.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(noise * loud)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(loud[:, None] ** 0.5)
    return model.eval()


def save_tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **options: Any,
) -> Path:
    """Writes `make_model(...)` with `make_tokenizer()` as a Hugging Face folder and returns it."""
    model = make_model(model_type, seed=seed, **options).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder
