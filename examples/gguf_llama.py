"""A GGUF file of a Llama as an ordinary Hugging Face folder.

transformers reads such files too, but not into a model that can be saved, and it goes through the
100,000 words and merges of a tokenizer once for the configuration, once for the tokenizer and once
for the weights (35 s for SmolLM2-135M, of which a single reading is 4). Here everything is read
once. What this module does not know is refused by name.

    python examples/gguf_llama.py model.gguf out/model
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

# Names in the file -> names in transformers; {} is the number of a layer.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
# Of the other keys of the architecture these say nothing more.
KNOWN = {"rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"}
# tokenizer.ggml.pre -> what splits a text before GPT-2's rule does; SmolLM reads digits singly.
SPLITS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "default": [],
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}
CONTROL = 3  # of tokenizer.ggml.token_type: a special token
ORDINARY = 1


def convert(source: Path, out: Path) -> Path:
    """Writes the folder: config, bfloat16 weights, tokenizer with chat template, a card.

    Args:
        source: the file.
        out: the folder; appears complete, by a rename, and replaces what is there.

    Returns:
        out.

    Raises:
        ValueError: another architecture or tokenizer, or a key or tensor that is not known.
    """
    reader = GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = read_config(facts)
    tensors = read_tensors(reader, config)
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    ids = {f"{name}_token_id": facts.get(f"tokenizer.ggml.{key}") for name, key in TOKENS.items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        config.update(ids)
        config.save_pretrained(temporary)
        GenerationConfig(**ids).save_pretrained(temporary)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        read_tokenizer(facts).save_pretrained(temporary)
        licence = facts.get("general.license", "unknown")
        (temporary / "README.md").write_text(
            f"---\nlicense: {licence}\n---\n\n{facts.get('general.name', out.name)}, from "
            f"{source.name}: quantized values of blocks, rounded to bfloat16.\n"
        )
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


TOKENS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
}


def read_config(facts: dict[str, Any]) -> LlamaConfig:
    """The configuration of transformers."""
    kind = facts["general.architecture"]
    if kind != "llama":
        raise ValueError(f"general.architecture: expected 'llama', got {kind!r}")
    found = {
        name.removeprefix("llama."): v for name, v in facts.items() if name.startswith("llama.")
    }
    unknown = sorted(found.keys() - SIZES.keys() - KNOWN)
    if unknown:
        raise ValueError(f"llama.{unknown[0]}: not known here, got {found[unknown[0]]!r}")
    sizes = {name: found[key] for key, name in SIZES.items() if key in found}
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if found.get(key, head_dim) != head_dim:
            raise ValueError(f"llama.{key}: expected {head_dim}, got {found[key]}")
    rope = {"rope_type": "default", "rope_theta": found.get("rope.freq_base", 10000.0)}
    return LlamaConfig(
        **sizes,
        head_dim=head_dim,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def read_tensors(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The weights in bfloat16 under the names of transformers."""
    found = {}
    for tensor in reader.tensors:
        name = TENSORS.get(tensor.name)
        parts = tensor.name.split(".")  # blk.N.NAME.weight
        if name is None and parts[0] == "blk" and parts[2] in LAYER_TENSORS:
            name = f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
        if name is None or not name.endswith(".weight"):
            raise ValueError(f"{tensor.name}: not known here")
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if parts[-2] in ("attn_q", "attn_k"):
            values = halves(values, config.head_dim)
        found[name] = values.bfloat16()
    return found


def halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of every head as transformers' RoPE wants them: the file has a pair's rows side by
    side, transformers has all first ones and then all second ones."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, with the file's special tokens and chat template.

    Words are split by the file's rule; transformers takes GPT-2's for every file of this kind.
    """
    kind = facts["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), got {kind!r}")
    for key in ("add_space_prefix", "add_bos_token", "add_eos_token"):
        if facts.get(f"tokenizer.ggml.{key}"):
            raise ValueError(f"tokenizer.ggml.{key}: expected false, got true")
    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    if not set(kinds) <= {ORDINARY, CONTROL}:
        raise ValueError(
            f"tokenizer.ggml.token_type: expected ordinary and control tokens ({ORDINARY}, "
            f"{CONTROL}), got {sorted(set(kinds))}"
        )
    rule = facts.get("tokenizer.ggml.pre", "default")
    if rule not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}, got {rule!r}")
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*SPLITS[rule], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in special])
    names = {f"{name}_token": key for name, key in {**TOKENS, "unk": "unknown_token_id"}.items()}
    found = {name: facts.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=facts.get("tokenizer.chat_template"),
        **{name: words[index] for name, index in found.items() if index is not None},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Converts a file.

    Args:
        argv: command-line arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path, help="GGUF file")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    print(f"written to {convert(args.source, args.out)}")


if __name__ == "__main__":
    main()
