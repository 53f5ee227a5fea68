"""A tiny random Llama, a byte-level tokenizer, and the result of a run of the program."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from resq_kernels.testing.tiny_models import make_model, make_tokenizer

POSITIONS = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; puts `<|endoftext|>` in front as Llama's does its BOS."""
    tokenizer = make_tokenizer()
    mark = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.eos_token_id)]
    )
    return tokenizer


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """`make_model` with few positions: 2 layers, hidden 128, 4 heads of 64 over 2 kv heads."""
    return make_model("llama", seed=seed, **{"max_position_embeddings": POSITIONS} | changes)


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of the program printed and returned."""

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
