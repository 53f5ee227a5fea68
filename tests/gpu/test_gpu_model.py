"""A whole quantized model on a GPU against the same model on the CPU."""

from __future__ import annotations

import pytest
import torch

from resq_kernels import DecodeGraph, ResQCache, graph_decoding
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


@torch.no_grad()
def test_a_long_prompt_does_not_depend_on_how_it_is_cut() -> None:
    """Up to the rounding of prefill.attend in the first layer, whose input does not depend on it
    either; after that a rounded code may be another. batch_invariant keeps all bits."""
    model = random_quantized("llama", num_hidden_layers=2).cuda()
    tokens = torch.randint(0, model.config.vocab_size, (2, 210), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, :30] = 0  # padding on the left
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )

    def run(chunks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layer's attention and the logits, of tokens that are no padding."""
        seen.clear()
        logits, cache, end = [], None, 0
        for part in tokens.split(chunks, dim=1):
            end += part.shape[1]
            out = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(seen, dim=1)[mask.bool()], torch.cat(logits, dim=1)[mask.bool()]

    chunks = [100, 80, 20, 10]
    whole, cut = run([210])[0], run(chunks)[0]
    for layer in model.model.layers:
        layer.self_attn.batch_invariant = True
    exact = run([210])
    assert all(map(torch.equal, run(chunks), exact))
    assert not torch.equal(whole, exact[0])  # the other path
    # Both paths round q, K or their products, V and the weights to float16, 2^-11 each.
    for rows in (whole, cut):
        assert ((rows - exact[0]).norm(dim=-1) < 8 * 2**-11 * exact[0].norm(dim=-1)).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_captured_step_is_the_ordinary_one(family: str, padded: bool) -> None:
    """Pages bit for bit, which holds every layer but the last's attention to its bits; logits up to
    the order of a sum, as cuBLAS may take another kernel for the head during a capture."""
    model = random_quantized(family, num_hidden_layers=3).cuda()
    start, steps = 60, 75  # over two edges of pages
    ids = torch.randint(0, model.config.vocab_size, (3, start + steps), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, : 5 * padded] = 0
    caches = [ResQCache(model.config) for _ in range(2)]

    def ordinary(cache: ResQCache, first: int, end: int) -> torch.Tensor:
        positions = (mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, first:]
        options = {"attention_mask": mask[:, :end], "position_ids": positions}
        part = ids[:, first:end]
        return model(part, past_key_values=cache, use_cache=True, **options).logits[:, -1]

    for cache in caches:
        ordinary(cache, 0, start)
    graph = DecodeGraph(model, caches[0], steps)
    assert caches[0].get_seq_length() == start
    for column in range(start, start + steps - 1):
        expected = ordinary(caches[1], column, column + 1)
        distance = (graph.step(ids[:, column]) - expected).norm() / expected.norm()
        assert distance < 1e-5, column
    tables = [cache.layers[-1].paged._by_sequence()[:, :2] for cache in caches]
    assert torch.equal(*tables)  # of 64 tokens, full in every sequence
    last = start + steps - 1
    logits = [ordinary(cache, last, last + 1) for cache in caches]  # the cache goes on
    assert torch.equal(*logits)


@torch.no_grad()
def test_generate_by_captured_steps_returns_the_same_tokens() -> None:
    model = random_quantized("llama", num_hidden_layers=2).cuda()
    ids = torch.randint(0, model.config.vocab_size, (2, 17), device="cuda")
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=graph_decoding, **options), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_all_layers_by_one_call_have_the_bits_of_layers_one_by_one(family: str) -> None:
    model = random_quantized(family).to("cuda", torch.bfloat16)
    ids = torch.randint(3, 250, (3, 40), device="cuda")
    found = []
    for singly in (False, True):
        if singly:
            model.model.layers[0].register_forward_hook(lambda module, args, output: None)
        cache, logits = ResQCache(model.config), []
        for start, end in ((0, 20), (20, 21), (21, 39), (39, 40)):
            with torch.no_grad():
                out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        found.append(torch.cat(logits, 1))
    assert torch.equal(*found)
