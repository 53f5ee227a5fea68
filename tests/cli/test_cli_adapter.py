"""--adapter: a LoRA adapter of peft, over a float and over a quantized model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from cli_support import Result, byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resq_kernels.testing.quantized_models import random_quantized

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    random_quantized("llama", max_position_embeddings=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of the float model, with an effect."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4)
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, replace: Callable[[dict], object]) -> None:
    tensors = load_file(adapter / FILE)
    replace(tensors)
    save_file(tensors, adapter / FILE)


@pytest.mark.parametrize("kind", ["llama", "quantized"])
def test_text_is_that_of_peft(
    request: pytest.FixtureRequest,
    kind: str,
    adapter: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
) -> None:
    folder, target = request.getfixturevalue(kind), tmp_path / "out.json"
    given = ("generate", folder, "--prompt", "def f", "--max-new-tokens", 12)
    plain = resq(*given).out
    result = resq(*given, "--adapter", adapter, "--json", target)
    assert result.code == 0 and result.out != plain
    figures = json.loads(target.read_text())
    assert figures["adapter"] == str(adapter)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    ids = torch.tensor([byte_tokenizer()("def f")["input_ids"]])
    tokens = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert figures["text"] == byte_tokenizer().decode(tokens, skip_special_tokens=True)


def test_a_conversation_with_an_adapter(
    tmp_path: Path,
    adapter: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder, target = tmp_path / "model", tmp_path / "out.json"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    answers = []
    for options in ((), ("--adapter", adapter)):
        monkeypatch.setattr("sys.stdin", io.StringIO("def f\n"))
        result = resq("chat", folder, "--max-new-tokens", 8, "--json", target, *options)
        assert result.code == 0, result.err
        answers.append(json.loads(target.read_text()))
    assert [answer["adapter"] for answer in answers] == [None, str(adapter)]
    assert answers[0]["turns"][0]["assistant"] != answers[1]["turns"][0]["assistant"]


def test_an_evaluation_puts_it_on_both_models(
    llama: Path, text_file: Path, adapter: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    given = ("eval", llama, "--text", text_file, "--seqlen", 32, "--reference", llama)
    target, found = tmp_path / "out.json", []
    for options in ((), ("--adapter", adapter)):
        result = resq(*given, *options, "--json", target)
        assert result.code == 0, result.err
        found.append(json.loads(target.read_text()))
    assert found[1]["adapter"] == str(adapter) and str(adapter) in result.out
    assert found[1]["kl_to_reference"] == 0.0
    assert found[1]["perplexity"] != found[0]["perplexity"]
    result = resq("eval", llama, "--text", text_file, "--adapter", adapter, "--fake-quant")
    assert result.code == 2 and "--fake-quant: expected a model without --adapter" in result.err


def test_adapters_that_do_not_fit(
    llama: Path, adapter: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    def refused(where: Path, words: str) -> None:
        result = resq("generate", llama, "--prompt", "x", "--max-new-tokens", 1, "--adapter", where)
        assert (result.code, result.out) == (1, "") and words in result.err
        assert str(where) in result.err and result.err.count("\n") == 1

    refused(llama, "not a folder of a peft adapter (no adapter_config.json)")
    refused(tmp_path / "none", "neither a folder nor a model on the hub")
    first = sorted(load_file(adapter / FILE))[0]
    change(adapter, lambda tensors: tensors.pop(first))
    refused(adapter, "the adapter lacks model.layers.0.mlp.down_proj.lora_A")
    change(adapter, lambda tensors: tensors.update({first: torch.zeros(4, 7)}))
    refused(adapter, "the adapter has tensors of other shapes than this model's")
