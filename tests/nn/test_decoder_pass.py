"""All layers by one call: the bits of the layers one by one, and when it is not made."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from resq_kernels import DecodeGraph, ResQCache, ResQConfig, ops
from resq_kernels.nn import decoder_layers
from resq_kernels.testing.quantized_models import random_quantized

PAGE = 32
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 256}
MODELS: dict[str, tuple[str, ResQConfig, dict[str, Any]]] = {
    "llama": ("llama", ResQConfig(), {}),
    "llama, heads of 128": ("llama", ResQConfig(), WIDE),
    "qwen2, with biases": ("qwen2", ResQConfig(), {}),
    "8-bit activations": ("llama", ResQConfig(lo_bits=8), {}),
    "quarot": ("llama", ResQConfig(method="quarot", high_fraction=0.0), {}),
    "quik": ("qwen2", ResQConfig(method="quik"), {}),
    "rtn": ("qwen2", ResQConfig(method="rtn", high_fraction=0.0), {}),
    "llama, all biases": ("llama", ResQConfig(), {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", ResQConfig(), {}),
    "tied head in 8 bits": (
        "llama",
        ResQConfig(embedding_bits=8),
        {"tie_word_embeddings": True},
    ),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of every call of the operator, prepared or not."""
    made: list[int] = []
    right, prepare, step = ops.decoder_layers, ops.prepare_decode_step, ops.decode_step
    depth: list[int] = []
    monkeypatch.setattr(
        ops, "decoder_layers", lambda *args: made.append(len(args[3])) or right(*args)
    )
    monkeypatch.setattr(
        ops, "prepare_decode_step", lambda *args: depth.append(len(args[3])) or prepare(*args)
    )
    monkeypatch.setattr(ops, "decode_step", lambda *args: made.append(depth[-1]) or step(*args))
    return made


@pytest.fixture
def model() -> Any:
    return random_quantized("llama")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(3))


def see(module: nn.Module) -> Callable[[], None]:
    """A hook that only makes layers be called one by one; returns what removes it."""
    return module.register_forward_hook(lambda module, args, output: None).remove


@torch.no_grad()
def passes(model: Any, cache: Any, ids: torch.Tensor, *ends: int, **options: Any) -> torch.Tensor:
    """Logits of ids, of which every pass takes those up to its end."""
    found, start = [], 0
    for end in ends:
        given = {name: value[:, :end] for name, value in options.items()}
        new = ids[:, start:end]
        found.append(model(new, past_key_values=cache, use_cache=True, **given).logits)
        start = end
    return torch.cat(found, 1)


def pages(cache: Any) -> list[torch.Tensor]:
    return [layer.paged._by_sequence()[:, : layer.paged.used_pages] for layer in cache.layers]


def check(model: Any, calls: list[int], ids: torch.Tensor, *ends: int, **options: Any) -> None:
    """One call a pass, and the bits of layers that are called one by one."""
    calls.clear()
    cache, other = ResQCache(model.config, PAGE), ResQCache(model.config, PAGE)
    found = passes(model, cache, ids, *ends, **options)
    assert calls == len(ends) * [model.config.num_hidden_layers]
    remove = see(model.model.layers[-1].mlp)
    expected = passes(model, other, ids, *ends, **options)
    remove()
    assert len(calls) == len(ends)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == other.get_seq_length() == ends[-1]


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_the_layers_one_by_one(name: str, calls: list[int]) -> None:
    family, options, sizes = MODELS[name]
    check(random_quantized(family, options, **sizes), calls, tokens(2, 80), 37, 38, 39, 71, 80)


@pytest.mark.parametrize(
    ("family", "sizes"), [("qwen3", {}), ("smollm3", {}), ("smollm3", {"no_rope_layers": [0, 0]})]
)
def test_norms_of_heads_and_layers_without_rope_are_not_this_operator_s(
    family: str, sizes: dict[str, Any], calls: list[int]
) -> None:
    model, ids = random_quantized(family, **sizes), tokens(2, 9)
    found = passes(model, ResQCache(model.config, PAGE), ids, 7, 8, 9)
    assert not calls and decoder_layers.DecoderLayers.of(model.model, {}) is None
    assert torch.equal(found, passes(model, ResQCache(model.config, PAGE), ids, 9))


def test_layers_that_rope_turns_are_this_operator_s_in_any_model(calls: list[int]) -> None:
    sizes = {"no_rope_layers": [1, 1], "attention_bias": True}
    check(random_quantized("smollm3", **sizes), calls, tokens(2, 9), 7, 8, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, model: Any, calls: list[int]) -> None:
    check(model, calls, tokens(2, 9), 7, 8, 9)  # a plan is made of it
    check(model.to(dtype), calls, tokens(2, 9), 7, 8, 9)


def test_the_decode_steps_of_a_padded_batch(model: Any, calls: list[int]) -> None:
    """The prompt has rows of padding, which the operators skip row by row; its steps have none."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = mask[2, :1] = 0
    cache, other = ResQCache(model.config, PAGE), ResQCache(model.config, PAGE)
    found = passes(model, cache, ids, 9, 10, 11, 12, attention_mask=mask)
    assert calls == [2, 2, 2]
    remove = see(model.model.layers[0])
    expected = passes(model, other, ids, 9, 10, 11, 12, attention_mask=mask)
    remove()
    assert torch.equal(found[:, 9:], expected[:, 9:])
    assert torch.equal(found[1], expected[1])  # the prompt without padding


def test_generate_and_a_dynamic_cache(model: Any, calls: list[int]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    found = model.generate(tokens(2, 5), **options)
    assert len(calls) == found.shape[1] - 5
    remove = see(model.model.layers[1])
    assert torch.equal(model.generate(tokens(2, 5), **options), found)
    remove()
    cache = DynamicCache(config=model.config)
    passes(model, cache, tokens(1, 9), 8, 9)
    assert cache.get_seq_length() == 9


def test_steps_of_a_decode_graph(model: Any, calls: list[int]) -> None:
    ids, cache, other = tokens(2, 20), ResQCache(model.config, PAGE), ResQCache(model.config, PAGE)
    passes(model, cache, ids, 16)
    expected = passes(model, other, ids, 16, 17, 18)
    graph, made = DecodeGraph(model, cache, 4), len(calls)
    for column in (16, 17):
        assert torch.equal(graph.step(ids[:, column]), expected[:, column])
    assert len(calls) == made + 2


def test_a_cropped_cache_and_other_sequences(model: Any, calls: list[int]) -> None:
    cache, ids = ResQCache(model.config, PAGE), tokens(2, 40)
    expected = passes(model, cache, ids, 35, 40)
    cache.crop(-5)
    with torch.no_grad():
        again = model(ids[:, 35:], past_key_values=cache).logits
    assert torch.equal(again, expected[:, 35:])
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([1]))
    with torch.no_grad():
        again = model(ids[1:, 35:], past_key_values=cache).logits
    assert torch.equal(again, expected[1:, 35:])
    assert len(calls) == 4


def test_a_layer_out_of_step_is_refused_before_any_layer_writes(model: Any) -> None:
    cache, ids = ResQCache(model.config, PAGE), tokens(1, 9)
    passes(model, cache, ids, 8)
    cache.layers[1].paged.length = 7
    before = [part.clone() for part in pages(cache)]
    with pytest.raises(ValueError, match="expected a layer with the 8 columns .* got one with 7"):
        passes(model, cache, ids, 1)
    assert all(map(torch.equal, pages(cache), before))


def test_layers_with_pages_of_different_counts_are_called_one_by_one(
    model: Any, calls: list[int]
) -> None:
    cache, ids = ResQCache(model.config, PAGE), tokens(1, 9)
    expected = passes(model, ResQCache(model.config, PAGE), ids, 8, 9)
    passes(model, cache, ids, 8)
    cache.layers[1].paged.reserve(5 * PAGE)
    with torch.no_grad():
        found = model(ids[:, 8:], past_key_values=cache).logits
    assert torch.equal(found, expected[:, 8:]) and len(calls) == 3


class Doubled(nn.Module):
    """An adapter around a linear."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(x)


def adapt(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj = Doubled(model.model.layers[1].self_attn.o_proj)


def replace_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    right = mlp.forward
    mlp.forward = lambda x: 2 * right(x)


def hook_output(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def hook_input(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def halve_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def drop_layer(model: Any) -> None:
    del model.model.layers[1]


def another_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def another_class(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    right = type(mlp).forward
    mlp.__class__ = type("Twice", (type(mlp),), {"forward": lambda self, x: 2 * right(self, x)})


def other_rotation(model: Any) -> None:
    model.model.layers[1].self_attn.key_rotation.data = torch.eye(64, dtype=torch.float16)[None]


def other_gain(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.data.fill_(1)
    model.model.layers[1].input_layernorm.pack()


def other_weight(model: Any) -> None:
    linear = model.model.layers[1].mlp.down_proj
    linear.weight_scale.data.mul_(2)


def loaded(model: Any) -> None:
    model.load_state_dict(random_quantized("llama", seed=5).state_dict())


def other_clip(model: Any) -> None:
    linear = model.model.layers[1].mlp.down_proj
    linear.row_format = linear.row_format._replace(clip=0.5)


def new_bias(model: Any) -> None:
    linear = model.model.layers[1].mlp.down_proj
    linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features), False)


def new_bias_of_fused(model: Any) -> None:
    linear = model.model.layers[1].self_attn.qkv_proj
    linear.hold(linear.packed(), torch.linspace(-1, 1, linear.out_features))


def no_rotation(model: Any) -> None:
    model.model.layers[1].self_attn.key_rotation = None


def unfused(model: Any) -> None:
    model.model.layers[1].self_attn.unfuse()


# what is done to a model between two passes -> whether one call still computes its layers
CHANGES: dict[Callable[[Any], None], bool] = {
    adapt: False,
    replace_forward: False,
    hook_output: False,
    hook_input: False,
    another_class: False,
    other_clip: False,
    unfused: False,
    halve_layers: True,
    drop_layer: True,
    another_layer: True,
    other_rotation: True,
    other_gain: True,
    other_weight: True,
    loaded: True,
    new_bias: True,
    new_bias_of_fused: True,
    no_rotation: True,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_passes_is_seen(change: Any, model: Any, calls: list[int]) -> None:
    ids = tokens(1, 9)
    before = passes(model, ResQCache(model.config, PAGE), ids, 9)
    change(model)
    calls.clear()
    found = passes(model, ResQCache(model.config, PAGE), ids, 9)
    assert len(calls) == CHANGES[change]
    see(model.model.layers[0])
    expected = passes(model, ResQCache(model.config, PAGE), ids, 9)
    assert len(calls) == CHANGES[change]
    assert torch.equal(found, expected)
    if change is not unfused:
        assert not torch.equal(found, before)


def test_no_plan_keeps_a_module_that_was_replaced(model: Any) -> None:
    passes(model, ResQCache(model.config, PAGE), tokens(1, 4), 4)
    replaced = weakref.ref(model.model.layers[1].mlp)
    model.model.layers[1].mlp = Doubled(copy.deepcopy(model.model.layers[1].mlp))
    passes(model, ResQCache(model.config, PAGE), tokens(1, 4), 4)
    gc.collect()
    assert replaced() is None


def test_a_copy_has_weights_of_its_own(model: Any, calls: list[int]) -> None:
    ids = tokens(1, 9)
    before = passes(model, ResQCache(model.config, PAGE), ids, 9)
    other = copy.deepcopy(model)
    other_weight(other)
    assert not torch.equal(passes(other, ResQCache(model.config, PAGE), ids, 9), before)
    assert torch.equal(passes(model, ResQCache(model.config, PAGE), ids, 9), before)
    assert len(calls) == 3


@torch.no_grad()
def test_collected_states_are_those_of_single_layers(model: Any, calls: list[int]) -> None:
    ids = tokens(1, 9)
    plain = model(ids, use_cache=True)
    asked = model(ids, use_cache=True, output_hidden_states=True)
    assert len(calls) == 1 and len(asked.hidden_states) == 3
    assert not torch.equal(asked.hidden_states[0], asked.hidden_states[1])
    assert torch.equal(asked.logits, plain.logits)
    model(ids, use_cache=True)  # transformers leaves its hooks
    assert len(calls) == 2
    model.config.output_hidden_states = True
    assert len(model(ids, use_cache=True).hidden_states) == 3 and len(calls) == 2


@torch.no_grad()
def test_embeddings_instead_of_ids(model: Any, calls: list[int]) -> None:
    ids = tokens(1, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert calls == [2, 2]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_pass_without_a_cache(name: str, calls: list[int]) -> None:
    """One call whose layers share pages; longer than a page, so that some could be left over."""
    family, options, sizes = MODELS[name]
    model, ids = random_quantized(family, options, **sizes), tokens(2, 150)
    found = model(ids, use_cache=False).logits
    assert calls == [2]
    assert torch.equal(found, passes(model, ResQCache(model.config), ids, 150))
    assert calls == [2, 2]
    remove = see(model.model.layers[1])
    assert torch.equal(found, model(ids, use_cache=False).logits) and len(calls) == 2
    remove()


@torch.no_grad()
def test_padding_without_a_cache_is_for_single_layers(model: Any, calls: list[int]) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    full = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(full, model(ids, use_cache=False).logits) and calls == [2, 2]
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(found[0], full[0]) and not torch.equal(found[1, 4:], full[1, 4:])
    assert torch.equal(found[1, 4:], model(ids[1:, 4:], use_cache=False).logits[0])
    assert len(calls) == 3


def test_a_gradient_passes_through_single_layers(model: Any, calls: list[int]) -> None:
    embeds = torch.randn(1, 4, 128, requires_grad=True)
    logits = model(inputs_embeds=embeds, use_cache=True).logits
    assert not calls and logits.requires_grad
    assert torch.equal(logits, model(inputs_embeds=embeds.detach(), use_cache=True).logits)
    assert calls


def test_a_float_cache_is_not_this_operator_s(calls: list[int]) -> None:
    model = random_quantized("llama", ResQConfig(kv_bits=16))
    with torch.no_grad():
        model(tokens(1, 4), use_cache=True)
    assert not calls and decoder_layers.DecoderLayers.of(model.model, {}) is None


def test_a_global_hook_sees_every_module(model: Any, calls: list[int]) -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    try:
        passes(model, ResQCache(model.config, PAGE), tokens(1, 4), 4)
    finally:
        handle.remove()
    assert seen.count("ResQMLP") == 2 and not calls
