"""A whole quantized model on a GPU against the same model on the CPU."""

from __future__ import annotations

import pytest
import torch

from resq_kernels.testing.quantized_models import random_quantized

# Relative distance of the logits. The devices differ by codes that fall on the other side of a
# rounding edge and by attention's 16-bit products; one wrong page or column moves logits by 1e-1.
TOLERANCE = 0.03


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_and_decoding_agree_with_the_cpu_s(family: str) -> None:
    model = random_quantized(family, num_hidden_layers=2)
    tokens = torch.randint(0, model.config.vocab_size, (3, 33))
    expected = model(tokens, use_cache=True)
    following = model(tokens[:, :1], past_key_values=expected.past_key_values).logits
    model.cuda()
    result = model(tokens.cuda(), use_cache=True)
    step = model(tokens[:, :1].cuda(), past_key_values=result.past_key_values).logits
    for ours, wanted in ((result.logits, expected.logits), (step, following)):
        distance = (ours.cpu() - wanted).norm() / wanted.norm()
        assert distance < TOLERANCE


@torch.no_grad()
def test_generate_does_not_depend_on_the_batch() -> None:
    model = random_quantized("llama", num_hidden_layers=2).cuda()
    prompts = torch.randint(0, model.config.vocab_size, (4, 17), device="cuda")
    together = model.generate(prompts, max_new_tokens=12, do_sample=False)
    alone = model.generate(prompts[2:3], max_new_tokens=12, do_sample=False)
    assert torch.equal(together[2:3], alone)
