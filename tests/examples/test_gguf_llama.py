"""The converter of GGUF files against transformers' own reader; what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from resq_kernels.testing.tiny_models import make_model, make_tokenizer

gguf = pytest.importorskip("gguf")
gguf_llama = pytest.importorskip("gguf_llama")

TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
FILE = "model.gguf"


def words() -> tuple[list[str], list[str]]:
    """Tokens (special ones first) and merges."""
    letters = sorted(make_tokenizer().get_vocab())
    letters.remove("<|endoftext|>")
    merges = ["a b", "\u0120 a", "ab c", "1 2"]
    joined = [merge.replace(" ", "") for merge in merges]
    return ["<|endoftext|>", "<|end|>", *letters, *joined], merges


def write(folder: Path, tied: bool = True, split: str = "gpt-2", **changes: Any) -> Path:
    """A tiny Llama with 4-bit and 8-bit blocks as a GGUF file; `changes` replace or add keys."""
    tokens, merges = words()
    model = make_model("llama", vocab_size=len(tokens), head_dim=32, tie_word_embeddings=tied)
    config = model.config
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_name("a tiny model")
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": 128,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.vocab_size": len(tokens),
        "llama.rope.dimension_count": 32,
    } | changes
    for key, value in values.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    layer_names = {theirs: ours for ours, theirs in gguf_llama.LAYER_TENSORS.items()}
    names = {theirs: ours for ours, theirs in gguf_llama.TENSORS.items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        target = names.get(name)
        if target is None:
            _, _, layer, rest = name.split(".", 3)
            part, _, end = rest.rpartition(".")
            target = f"blk.{layer}.{layer_names[part]}.{end}"
        data = torch.randn(tensor.shape, generator=generator).numpy()
        kind = gguf.GGMLQuantizationType.F32
        if tensor.dim() == 2:
            eight = "embed" in name or "lm_head" in name
            kind = gguf.GGMLQuantizationType.Q8_0 if eight else gguf.GGMLQuantizationType.Q4_1
            data = gguf.quantize(data, kind)
        writer.add_tensor(target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / FILE


@pytest.mark.parametrize("tied", [True, False])
def test_folder_is_what_transformers_reads(tmp_path: Path, tied: bool) -> None:
    source = write(tmp_path, tied)
    folder = gguf_llama.convert(source, tmp_path / "out")
    model, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.bfloat16),
    )
    expected = theirs.state_dict()
    found = model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "head_dim"):
        assert getattr(model.config, name) == getattr(theirs.config, name), name
    assert model.config.tie_word_embeddings == tied
    assert model.generation_config.eos_token_id == 1
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_tokenizer_encodes_as_the_one_of_transformers(tmp_path: Path) -> None:
    folder = gguf_llama.convert(write(tmp_path), tmp_path / "out")
    mine = AutoTokenizer.from_pretrained(folder)
    theirs: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    text = " abc aab 12 1200\n\n  x\t\u00e4\u6771<|end|>it's <|endoftext|> ab"
    assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert mine.decode(mine(text)["input_ids"]) == text
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert set(mine.all_special_ids) == {0, 1} and mine.chat_template == TEMPLATE


def test_digits_are_split_where_the_file_says_so(tmp_path: Path) -> None:
    tokens, _ = words()
    for split, pieces in (("gpt-2", ["a", "12", "0"]), ("smollm", ["a", "1", "2", "0"])):
        folder = gguf_llama.convert(write(tmp_path, split=split), tmp_path / split)
        ids = AutoTokenizer.from_pretrained(folder)("a120")["input_ids"]
        assert [tokens[index] for index in ids] == pieces
    with pytest.raises(ValueError, match="pre: expected one of default, .*, got 'llama-bpe'"):
        gguf_llama.convert(write(tmp_path, split="llama-bpe"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llama.rope.scaling.factor": 2}, "llama.rope.scaling.factor: not known here, got 2"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count: expected 32, got 16"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, changes: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        gguf_llama.convert(write(tmp_path, **changes), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_tensors_and_tokenizers_that_are_not_known_are_refused() -> None:
    tensor = type("Tensor", (), {"name": "blk.0.attn_q.bias"})
    reader = type("Reader", (), {"tensors": [tensor]})
    with pytest.raises(ValueError, match="blk.0.attn_q.bias: not known here"):
        gguf_llama.read_tensors(reader, None)
    with pytest.raises(ValueError, match="general.architecture: expected 'llama', got 'qwen2'"):
        gguf_llama.read_config({"general.architecture": "qwen2"})
    with pytest.raises(ValueError, match="tokenizer.ggml.model: expected 'gpt2'"):
        gguf_llama.read_tokenizer({"tokenizer.ggml.model": "llama"})
    facts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.add_bos_token": True}
    with pytest.raises(ValueError, match="add_bos_token: expected false, got true"):
        gguf_llama.read_tokenizer(facts)
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.token_type": [4],
    }
    with pytest.raises(ValueError, match=r"token_type: expected ordinary and control .* got \[4\]"):
        gguf_llama.read_tokenizer(facts)
