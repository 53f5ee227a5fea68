"""ResQCache: decoding equals the full pass, and every change a caller can make to a cache."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from resq_kernels import ResQCache, ResQConfig
from resq_kernels.nn.batch import BatchState
from resq_kernels.nn.kv_cache import ResQCacheLayer
from resq_kernels.nn.paged import PagedKeysValues
from resq_kernels.testing.quantized_models import head_input, random_quantized
from resq_kernels.testing.tiny_models import make_model

POSITIONS = torch.arange(3)[None]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_quantized("qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def hidden(model: Any, ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    return head_input(model, ids, past_key_values=cache, use_cache=cache is not None, **kwargs)


@pytest.mark.parametrize("chunks", [[30, *[1] * 6, 4], [1, 39], [16, 16, 8]], ids=str)
@pytest.mark.parametrize("page_size", [32, 64])
def test_chunks_give_the_bits_of_the_full_pass(
    model: Any, chunks: list[int], page_size: int
) -> None:
    ids = tokens(2, 40)
    cache = ResQCache(model.config, page_size)
    got = [hidden(model, part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.get_seq_length() == 40
    assert torch.equal(torch.cat(got, dim=1), hidden(model, ids))


@pytest.mark.parametrize("method", ["quarot", "quik", "rtn"])
def test_other_methods_decode_too(method: str) -> None:
    uniform = random_quantized("llama", ResQConfig(method=method))
    ids = tokens(1, 20)
    cache = ResQCache(uniform.config)
    got = [hidden(uniform, part, cache) for part in ids.split([12, 1, 7], dim=1)]
    assert torch.equal(torch.cat(got, dim=1), hidden(uniform, ids))


def test_unquantized_cache_mode() -> None:
    plain = random_quantized("llama", ResQConfig(kv_bits=16))
    ids = tokens(2, 20)
    cache = DynamicCache(config=plain.config)
    got = [hidden(plain, part, cache) for part in ids.split([12, 1, 7], dim=1)]
    assert not any(isinstance(layer, ResQCacheLayer) for layer in cache.layers)
    torch.testing.assert_close(torch.cat(got, dim=1), hidden(plain, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_decode_as_alone(model: Any, side: str) -> None:
    ids, lengths, width = tokens(3, 24), [11, 18, 4], 18
    columns = torch.arange(width)
    mask = torch.stack([columns < n if side == "right" else columns >= width - n for n in lengths])
    prompt = torch.zeros(3, width, dtype=torch.long)
    for row, n in enumerate(lengths):
        prompt[row, mask[row]] = ids[row, :n]
    cache = ResQCache(model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hidden(model, prompt, cache, attention_mask=mask.long(), position_ids=positions)
    # Three tokens at once, then one: each row goes on where its own text ended.
    for new in (3, 1):
        start = torch.tensor(lengths)[:, None] + (0 if new == 3 else 3)
        positions = start + torch.arange(new)
        mask = torch.cat([mask, torch.ones(3, new, dtype=torch.bool)], dim=1)
        part = ids.gather(1, positions)
        got = hidden(model, part, cache, attention_mask=mask.long(), position_ids=positions)
        for row, first in enumerate(start[:, 0].tolist()):
            alone = hidden(model, ids[row : row + 1, : first + new])
            assert torch.equal(got[row], alone[0, -new:])


def test_a_dynamic_cache_becomes_paged(model: Any) -> None:
    ids = tokens(1, 9)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        hidden(model, ids[:, :5], cache)
        assert all(isinstance(layer, ResQCacheLayer) for layer in cache.layers)
        assert torch.equal(hidden(model, ids[:, 5:], cache), hidden(model, ids)[:, 5:])
    with torch.no_grad():
        cache = model(ids).past_key_values  # made by the model itself
    assert all(isinstance(layer, ResQCacheLayer) for layer in cache.layers)
    assert len(cache.layers) == 2 and len({id(layer.batch) for layer in cache.layers}) == 1


def test_other_caches_are_refused(model: Any) -> None:
    filled = DynamicCache(config=model.config)
    heads = torch.zeros(1, 2, 3, 64)
    for layer in range(2):
        filled.update(heads, heads, layer)
    with pytest.raises(ValueError, match="got a DynamicCache with a filled DynamicLayer"):
        hidden(model, tokens(1, 2), filled)
    static = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="leave it and cache_implementation out"):
        hidden(model, tokens(1, 2), static)
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True
    with pytest.raises(ValueError, match="empty DynamicLayer, offloaded"):
        hidden(model, tokens(1, 2), offloading)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_under_either_name_fills(model: Any, name: str) -> None:
    attention, cache = model.model.layers[0].self_attn, ResQCache(model.config)
    x, turn = torch.randn(1, 3, 256), model.model.rotary_emb(torch.randn(1, 3, 256), POSITIONS)
    attention(x, position_embeddings=turn, **{name: cache})
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("names", [["cache", "past_key_values"], ["past_key_value"]], ids=str)
def test_a_cache_is_not_overlooked(model: Any, names: list[str]) -> None:
    attention, caches = model.model.layers[0].self_attn, {n: ResQCache(model.config) for n in names}
    x, turn = torch.randn(1, 3, 256), model.model.rotary_emb(torch.randn(1, 3, 256), POSITIONS)
    with pytest.raises(TypeError, match=f"expected one cache.*got .*{names[-1]}$"):
        attention(x, position_embeddings=turn, **caches)
    assert all(cache.get_seq_length() == 0 for cache in caches.values())


def test_a_float_model_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="ResQCache: update: expected a model with 4-bit keys"):
        model(tokens(1, 2), past_key_values=ResQCache(model.config))


def test_crop(model: Any) -> None:
    ids = tokens(2, 50)
    cache = ResQCache(model.config, page_size=32)
    hidden(model, ids[:, :45], cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 25
    assert torch.equal(hidden(model, ids[:, 25:], cache), hidden(model, ids)[:, 25:])
    cache.crop(0)
    assert cache.get_seq_length() == 50
    with pytest.raises(ValueError, match="expected the negative number of tokens to remove, got 3"):
        cache.crop(3)


def test_crop_with_padding(model: Any) -> None:
    ids = tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    cache, other = ResQCache(model.config), ResQCache(model.config)
    for one, width in ((cache, 10), (other, 8)):
        hidden(model, ids[:, :width], one, attention_mask=mask[:, :width])
    cache.crop(-2)
    got, expected = (hidden(model, ids[:, 8:], one, attention_mask=mask) for one in (cache, other))
    assert torch.equal(got, expected)


def test_beams_select_and_repeat(model: Any) -> None:
    ids = tokens(3, 40)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :6] = 0

    def start() -> ResQCache:
        cache = ResQCache(model.config, page_size=32)
        hidden(model, ids[:, :39], cache, attention_mask=mask[:, :39])
        return cache

    def last(cache: ResQCache, rows: torch.Tensor) -> torch.Tensor:
        return hidden(model, ids[rows, 39:], cache, attention_mask=mask[rows])

    plain = last(start(), torch.arange(3))
    beams = torch.tensor([2, 0, 0])
    cache = start()
    cache.reorder_cache(beams)
    assert torch.equal(last(cache, beams), plain[beams])
    kept = torch.tensor([1])
    cache = start()
    cache.batch_select_indices(kept)
    assert torch.equal(last(cache, kept), plain[kept])
    twice = torch.tensor([0, 0, 1, 1, 2, 2])
    cache = start()
    cache.batch_repeat_interleave(2)
    assert torch.equal(last(cache, twice), plain[twice])


def test_reset_and_copies(model: Any) -> None:
    ids = tokens(1, 20)
    cache = ResQCache(model.config)
    first = hidden(model, ids[:, :12], cache)
    other = copy.deepcopy(cache)
    expected = hidden(model, ids)[:, 12:]
    assert torch.equal(hidden(model, ids[:, 12:], cache), expected)
    assert other.get_seq_length() == 12
    assert torch.equal(hidden(model, ids[:, 12:], other), expected)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory_bytes(reserved=True) == 0
    assert torch.equal(hidden(model, ids[:, :12], cache), first)


def test_a_cached_token_cannot_be_hidden_later(model: Any) -> None:
    cache = ResQCache(model.config)
    hidden(model, tokens(1, 6), cache)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="cannot be hidden or shown later"):
        hidden(model, tokens(1, 1), cache, attention_mask=mask)


@pytest.mark.parametrize(("head_dim", "expected"), [(64, 88), (128, 160)])
def test_memory_per_token_and_head(head_dim: int, expected: int) -> None:
    batch, heads, length = 2, 3, 3000
    paged, ones = PagedKeysValues(), torch.ones(1, length, head_dim)
    k = torch.randn(batch * length, heads, head_dim)
    metadata = BatchState().append(batch, length, None, k.device).with_rope(ones, ones)
    paged.append(metadata, k, k, None, 8)
    exact = expected * batch * heads * length
    assert exact <= paged.memory_bytes() < 1.02 * exact
    assert paged.memory_bytes(reserved=True) == paged.memory_bytes()


def test_growth_is_amortised() -> None:
    paged, state = PagedKeysValues(page_size=32), BatchState()
    token, ones = torch.randn(2, 1, 64), torch.ones(1, 1, 64)
    sizes = []
    for _ in range(300):
        metadata = state.append(2, 1, None, token.device).with_rope(ones, ones)
        paged.append(metadata, token, token, None, 8)
        state = metadata.after
        sizes.append(paged.pages_per_sequence)
    assert sizes[-1] == 16 and len(set(sizes)) == 5  # 1, 2, 4, 8, 16
    assert paged.memory_bytes() == 2 * 10 * 32 * 88
    assert paged.memory_bytes(reserved=True) == 2 * 16 * 32 * 88
