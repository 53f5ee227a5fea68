"""Training a quantized model, or something before it, is refused by name and never silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.arange(5, 30)[None]
NO_GRADIENT = "expected a tensor that needs no gradient, got one that requires it"


@pytest.fixture
def model() -> Any:
    return random_quantized("llama")


def test_a_gradient_of_the_inputs(model: Any) -> None:
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(RuntimeError, match=f"rms_norm_quantize: x: {NO_GRADIENT}"):
        model(inputs_embeds=embedded, labels=IDS)


def test_parameters_made_trainable(model: Any) -> None:
    model.model.norm.weight.requires_grad_()
    with pytest.raises(RuntimeError, match=f"x: {NO_GRADIENT}"):
        model(IDS, labels=IDS)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        model(IDS, labels=IDS)
    with torch.no_grad():  # inference does not mind
        assert torch.equal(model(IDS).logits, model.requires_grad_(False)(IDS).logits)


def test_switches_of_training(model: Any) -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.train()(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        model(IDS, labels=IDS)


def test_trainer(model: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model=model, args=arguments)


ADAPTERS: dict[str, tuple[Any, str]] = {
    "lora": (peft.LoraConfig(task_type="CAUSAL_LM"), "not found in the base model"),
    "lora on all": (peft.LoraConfig(target_modules="all-linear"), "found"),
    "lora on a linear": (
        peft.LoraConfig(target_modules=["down_proj"]),
        "ResQLinear.*not supported",
    ),
    "lora on a fused linear": (
        peft.LoraConfig(target_modules=["qkv_proj"]),
        "FusedLinear.*not supported",
    ),
    "ia3": (
        peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        "ResQLinear.*not supported",
    ),
    "tokens": (peft.TrainableTokensConfig(token_indices=[3]), r"ResQEmbedding: weight: expected"),
    "norms": (peft.LNTuningConfig(task_type="CAUSAL_LM"), NO_GRADIENT),
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), NO_GRADIENT),
    "p": (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), NO_GRADIENT),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "expected a ResQCache or an empty DynamicCache",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_peft(model: Any, kind: str) -> None:
    config, words = ADAPTERS[kind]
    with pytest.raises((ValueError, RuntimeError), match=words):
        peft.get_peft_model(model, config)(input_ids=IDS, labels=IDS).loss.backward()


def test_lora_on_separate_parts(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.unfuse()
    with pytest.raises(ValueError, match="ResQLinear.*not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def test_a_soft_prompt_that_is_not_trained(model: Any) -> None:
    """peft puts its vectors before those of the tokens."""
    keys = list(model.state_dict())
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        prompt = prompted.get_prompt(batch_size=1)
        embedded = torch.cat([prompt, model.get_input_embeddings()(IDS)], dim=1)
        expected = model(inputs_embeds=embedded).logits
        assert torch.equal(prompted(input_ids=IDS).logits, expected)
    assert list(model.state_dict()) == keys
