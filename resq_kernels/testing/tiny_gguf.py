"""Small GGUF files, written as llama.cpp's converter writes them; needs the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from resq_kernels.testing.tiny_models import make_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"


def stored_weights(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """What the matrices of a model are once they are stored as `kind`, in float32."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor.clone()
        to = GGMLQuantizationType[kind]
        return torch.from_numpy(dequantize(quantize(tensor.numpy(), to), to).copy())

    return {name: stored(tensor) for name, tensor in model.state_dict().items()}


def write_gguf(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    pre: str | None = None,
    facts: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a model of `tiny_models.make_model` with `make_tokenizer()`.

    Args:
        path: the file.
        model: a Llama, Qwen2 or Qwen3; its vocabulary is filled up with tokens that are not used.
        kind: how matrices are stored: "F32", "F16", "BF16", "Q8_0", "Q4_0", ...
        pre: the rule by which the tokenizer splits words; by default GPT-2's, or Qwen2's own.
        facts: keys that are added or, with a value, replaced.
        tensors: tensors of these names in the file are added or replaced.
    """
    import gguf

    config = model.config
    architecture = config.model_type
    pre = pre or ("gpt-2" if architecture == "llama" else "qwen2")
    facts = facts or {}
    writer = gguf.GGUFWriter(path, facts.get("general.architecture", architecture))
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if architecture == "llama":
        sizes |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if architecture != "qwen2":
        sizes |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    values = {f"{architecture}.{key}": value for key, value in sizes.items()}
    values |= {"general.license": "apache-2.0", "tokenizer.chat_template": TEMPLATE}
    values |= {f"tokenizer.ggml.{key}_token_id": 256 for key in ("eos", "padding")}
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    words = sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [word for word, _ in words]
    tokens += ["12", *(f"[PAD{index}]" for index in range(len(tokens) + 1, config.vocab_size))]
    values["tokenizer.ggml.token_type"] = [1] * 256 + [3, 1] + [5] * (len(tokens) - 258)
    values["tokenizer.ggml.tokens"] = tokens
    values["tokenizer.ggml.merges"] = ["1 2"]
    for key, value in (values | facts).items():  # None leaves a key out
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    arch = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj.weight": config.num_attention_heads}
        heads["k_proj.weight"] = config.num_key_value_heads
        count = heads.get(".".join(name.split(".")[-2:]))
        if architecture == "llama" and count:
            # llama.cpp's `permute`.
            rows, columns = tensor.shape
            tensor = tensor.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2)
            tensor = tensor.reshape(rows, columns)
        found[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = tensor
    for name, tensor in (found | (tensors or {})).items():
        to = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        data = gguf.quantize(tensor.float().contiguous().numpy(), to)
        writer.add_tensor(name, data, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
