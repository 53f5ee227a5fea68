"""A tiny random Llama, a byte-level tokenizer, and the answer of a run of the program."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; id 0 is the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>", add_bos_token=True
    )


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama: 2 layers, hidden 128, 2 heads of 64 over 1 kv head, 257 words."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of the program answered."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The error that the user reads; exactly one line of `resq: error:`."""
        lines = [line for line in self.err.splitlines() if line.startswith("resq: error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("resq: error: ")
