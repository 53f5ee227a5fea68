"""The models that `resq bench` knows by name: the sizes of their transformers configurations."""

from __future__ import annotations

from resq_kernels.architecture import ModelShape
from resq_kernels.config import ResQConfig

# name -> (model_type, hidden, intermediate, layers, query heads, kv heads, vocabulary, tied head)
SIZES = {
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-3-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    "qwen2.5-72b": ("qwen2", 8192, 29568, 80, 64, 8, 152064, False),
}
OPTIONS = ResQConfig()
"""How the models are quantized."""
SQUARE = "square"  # for gemm alone: one 4096 x 4096 layer


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(SIZES)


def configuration(name: str, layers: int | None = None) -> dict[str, object]:
    """The fields of a model's transformers configuration; `layers` cuts its depth."""
    model_type, hidden, intermediate, depth, heads, kv_heads, vocab, tied = SIZES[name]
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": min(layers or depth, depth),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6 if model_type == "qwen2" else 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def shape(name: str) -> ModelShape:
    """The sizes of a model."""
    return ModelShape.from_config(configuration(name))


def layers(name: str) -> list[tuple[str, int, int, int]]:
    """(layer, N, K, K_hi) of a model's GEMMs; q, k, v and gate, up are one GEMM each."""
    if name == SQUARE:
        return [(SQUARE, 4096, 4096, 512)]
    size = shape(name)
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    products = [
        ("qkv", q + 2 * kv, "self_attn.q_proj"),
        ("o", size.hidden, "self_attn.o_proj"),
        ("gate_up", 2 * size.intermediate, "mlp.gate_proj"),
        ("down", size.hidden, "mlp.down_proj"),
    ]
    return [
        (layer, n, size.linear(part)[1], size.k_hi(part, OPTIONS)) for layer, n, part in products
    ]


def heads(name: str) -> tuple[int, int, int]:
    """(query heads, key and value heads, head_dim)."""
    size = shape(name)
    return size.heads, size.kv_heads, size.head_dim
