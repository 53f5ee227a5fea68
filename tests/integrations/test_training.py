"""What is before a quantized model is trained through it; its own weights never are, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from resq_kernels import ResQConfig
from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.arange(5, 30)[None]
NO_GRADIENT = "expected a tensor that needs no gradient, got one that requires it"


@pytest.fixture
def model() -> Any:
    return random_quantized("llama")


def test_a_gradient_of_the_inputs(model: Any) -> None:
    """In the float model's basis, in which the inputs are; it lowers the loss."""
    source = model.get_input_embeddings()(IDS).detach()
    embedded = source.clone().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=IDS).loss
    loss.backward()
    step = source - 0.3 * embedded.grad / embedded.grad.norm()
    assert model(inputs_embeds=step, labels=IDS).loss < loss - 0.05


def test_parameters_made_trainable(model: Any) -> None:
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        model(IDS, labels=IDS)
    with torch.no_grad():  # inference does not mind
        assert torch.equal(model(IDS).logits, model.requires_grad_(False)(IDS).logits)


def test_switches_of_training(model: Any) -> None:
    """There is nothing in the model to train."""
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.train()(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_enable()
    loss = model(IDS, labels=IDS).loss  # transformers makes the embedding's result need one
    loss.backward()
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_trainer(model: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model=model, args=arguments)


ADAPTERS: dict[str, tuple[Any, str]] = {
    "ia3": (
        peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        "ResQLinear.*not supported",
    ),
    "tokens": (peft.TrainableTokensConfig(token_indices=[3]), r"ResQEmbedding: weight: expected"),
    "norms": (peft.LNTuningConfig(task_type="CAUSAL_LM"), NO_GRADIENT),
    "loha": (peft.LoHaConfig(target_modules=["down_proj"]), "ResQLinear.*not supported"),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "expected a ResQCache or an empty DynamicCache",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_peft(model: Any, kind: str) -> None:
    config, words = ADAPTERS[kind]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        peft.get_peft_model(model, config)(input_ids=IDS, labels=IDS).loss.backward()


def test_tokens_of_an_embedding_in_16_bits() -> None:
    """peft reads its weight, which is rotated."""
    config = peft.TrainableTokensConfig(token_indices=[3])
    with pytest.raises(ValueError, match="TrainableTokens: expected the float model's embedding"):
        peft.get_peft_model(random_quantized("llama", ResQConfig(embedding_bits=16)), config)
    plain = random_quantized("llama", ResQConfig(method="rtn", embedding_bits=16))
    expected = plain(IDS).logits
    assert torch.equal(peft.get_peft_model(plain, config)(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_a_soft_prompt_is_trained(model: Any, kind: Any) -> None:
    """Its vectors are the float model's embeddings, so that it serves the float model too."""
    torch.manual_seed(0)
    prompted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    optimizer = torch.optim.Adam((p for p in prompted.parameters() if p.requires_grad), 0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = prompted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


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
