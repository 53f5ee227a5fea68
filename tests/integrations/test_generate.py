"""generate() on a quantized model: it uses 4-bit pages by itself, in every mode."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, pipeline
from transformers.cache_utils import DynamicLayer

from resq_kernels import ResQCache, ops
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_tokenizer

NEW = 8


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_quantized("qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    model.generation_config.eos_token_id = None  # random text would end at random
    model.generation_config.pad_token_id = 0
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(4))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(NEW):
            last = model(ids, use_cache=False).logits[:, -1:]
            ids = torch.cat([ids, last.argmax(-1)], dim=1)
    return ids


def test_greedy_uses_pages_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    appended, steps = [], []
    layers, one = ops.decoder_layers, ops.decode_step

    def count(x: torch.Tensor, cos: Any, sin: Any, caches: Any, *args: Any) -> Any:
        appended.append((len(caches), len(x)))
        return layers(x, cos, sin, caches, *args)

    def step(prepared: torch.Tensor, x: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        steps.append(len(x))
        return one(prepared, x, seq_lens)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a float cache was filled")

    ids = tokens(2, 11)
    expected = greedy(model, ids)
    monkeypatch.setattr(ops, "decoder_layers", count)
    monkeypatch.setattr(ops, "decode_step", step)
    monkeypatch.setattr(DynamicLayer, "update", never)
    assert torch.equal(generate(model, ids), expected)
    assert appended == [(model.config.num_hidden_layers, 22)]
    assert steps == (NEW - 1) * [2]


@pytest.mark.parametrize("cache", [None, DynamicCache, ResQCache])
def test_every_way_to_pass_a_cache(model: Any, cache: Any) -> None:
    ids = tokens(1, 7)
    options = {} if cache is None else {"past_key_values": cache(config=model.config)}
    assert torch.equal(generate(model, ids, **options), greedy(model, ids))


def test_a_cache_goes_on_in_the_next_call(model: Any) -> None:
    cache = ResQCache(model.config)
    first = generate(model, tokens(1, 7), past_key_values=cache)
    longer = torch.cat([first, tokens(1, 5)], dim=1)
    assert torch.equal(generate(model, longer, past_key_values=cache), greedy(model, longer))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_left_padded_batch_equals_single_prompts(model: Any, options: dict[str, Any]) -> None:
    lengths, width = [5, 12, 9], 12
    ids = tokens(3, width)
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    got = generate(model, ids * mask, attention_mask=mask, **options)
    for row, n in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, width - n :], **options)
        assert torch.equal(got[row, width - n :], alone[0])


def test_beams_equal_beams_without_a_cache(model: Any) -> None:
    ids = tokens(2, 9)
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7}
    expected = generate(model, ids, use_cache=False, **options)
    assert torch.equal(generate(model, ids, **options), expected)
    assert not torch.equal(expected[::2], generate(model, ids))  # beams found something else


def test_sampling_repeats_with_its_seed(model: Any) -> None:
    ids = tokens(2, 6)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate(model, ids, do_sample=True, temperature=1.5, top_k=50))
    torch.manual_seed(0)
    expected = generate(model, ids, do_sample=True, temperature=1.5, top_k=50, use_cache=False)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], expected)
    assert not torch.equal(runs[0], runs[2])


def test_prompt_lookup_crops_the_cache(model: Any) -> None:
    ids = tokens(1, 6).repeat(1, 4)  # repeats itself, so that lookups propose tokens
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), greedy(model, ids))


def test_assisted_generation(model: Any) -> None:
    ids = tokens(1, 9)
    assistant = random_quantized("qwen2", num_hidden_layers=1, seed=5)
    assistant.generation_config.eos_token_id = None
    got = generate(model, ids, assistant_model=assistant)
    assert torch.equal(got, greedy(model, ids))


def test_chunked_prefill(model: Any) -> None:
    ids = tokens(2, 21)
    assert torch.equal(generate(model, ids, prefill_chunk_size=8), greedy(model, ids))


def test_static_cache_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="leave it and cache_implementation out"):
        generate(model, tokens(1, 4), cache_implementation="static")


def test_pipeline(model: Any) -> None:
    tokenizer = make_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe("A fox", max_new_tokens=NEW, do_sample=False)[0]["generated_text"]
    ids = greedy(model, tokenizer("A fox", return_tensors="pt").input_ids)
    assert text == tokenizer.decode(ids[0])
