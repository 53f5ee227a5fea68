"""What callers of transformers ask a quantized model for: it is used, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

from resq_kernels import ResQConfig
from resq_kernels.architecture import FAMILIES
from resq_kernels.fake_quant import fake_quantized
from resq_kernels.nn.kv_cache import ResQCache
from resq_kernels.nn.weight_view import WeightView
from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.arange(5, 30)[None]
ATTENTION = {4: "resq", 16: "sdpa"}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> torch.Tensor:
    return model(ids, **arguments).logits


def make_folder(tmp_path_factory: pytest.TempPathFactory, kv_bits: int) -> Path:
    path = tmp_path_factory.mktemp(f"kv{kv_bits}")
    random_quantized("llama", ResQConfig(kv_bits=kv_bits)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {kv_bits: make_folder(tmp_path_factory, kv_bits) for kv_bits in ATTENTION}


@pytest.fixture
def model(folders: dict[int, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[4])


@pytest.mark.parametrize("kv_bits", ATTENTION)
def test_attn_implementation_is_the_models_own_or_refused(
    folders: dict[int, Path], kv_bits: int
) -> None:
    folder, own = folders[kv_bits], ATTENTION[kv_bits]
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    for given in (None, "resq", own):
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=given)
        assert loaded.config._attn_implementation == own
        loaded.set_attn_implementation(own)
        assert torch.equal(logits(loaded), expected)
    words = f"ResQ: attn_implementation: expected '{own}' .* got"
    for other in ("eager", "sdpa", "flash_attention_2", "flex_attention", "paged|eager"):
        if other == own:
            continue
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=other)
        config = AutoConfig.from_pretrained(folder, attn_implementation=other)
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(folder, config=config)
    for other in ("eager", "paged|eager"):
        loaded.set_attn_implementation(other)
        with pytest.raises(ValueError, match=words):
            logits(loaded)
        with pytest.raises(ValueError, match=words):
            loaded.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("kv_bits", ATTENTION)
def test_attention_weights_are_refused(folders: dict[int, Path], kv_bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[kv_bits])
    for call in (model, model.model):
        with pytest.raises(ValueError, match="output_attentions: expected False, got True"):
            call(IDS, output_attentions=True)


@pytest.mark.parametrize("kv_bits", ATTENTION)
def test_caches_of_other_kinds(folders: dict[int, Path], kv_bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[kv_bits])
    legacy = tuple((torch.ones(1, 2, 3, 64),) * 2 for _ in range(2))
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="ResQ: cache: expected a Cache .* got tuple"):
            logits(model, **{name: legacy})
    expected, greedy = logits(model), {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(IDS, **greedy)
    assert torch.equal(logits(model, use_cache=False), expected)
    assert torch.equal(model.generate(IDS, use_cache=False, **greedy), tokens)
    assert torch.equal(
        model.generate(IDS, cache=DynamicCache(config=model.config), **greedy), tokens
    )
    static = StaticCache(config=model.config, max_cache_len=64)
    if kv_bits == 16:
        torch.testing.assert_close(logits(model, cache=static), expected)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **greedy), tokens)
        return
    with pytest.raises(ValueError, match="cache: expected a ResQCache .* got a StaticCache"):
        logits(model, cache=static)
    for kind in ("static", "offloaded"):
        with pytest.raises(ValueError, match="leave it and cache_implementation out"):
            model.generate(IDS, cache_implementation=kind, **greedy)


def test_continuous_batching_is_refused(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=0)
    with pytest.raises(ValueError, match="resq is not supported for continuous batching"):
        model.generate_batch(inputs=[[5, 6, 7], [8, 9]], generation_config=config)


def test_masks(model: Any) -> None:
    expected, columns = logits(model), IDS.shape[1]
    ones = torch.ones_like(IDS)
    for dtype in (torch.bool, torch.int32, torch.int64, torch.float32):
        assert torch.equal(logits(model, attention_mask=ones.to(dtype)), expected)
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)
    refused = (
        ones[:, :-5],
        torch.ones(1, columns + 5),
        ones.expand(3, -1),
        causal,
        additive,
        causal[0],
    )
    for mask in refused:
        with pytest.raises(ValueError, match=rf"attention_mask: expected \[1, {columns}\]"):
            logits(model, attention_mask=mask)
    with pytest.raises(ValueError, match="expected a causal mask with padding"):
        logits(model, is_causal=False)


def test_a_mask_that_shows_cached_padding_is_refused(model: Any) -> None:
    """All ones ask for the padding of earlier columns, as no mask does not."""
    mask, columns = torch.ones_like(IDS), IDS.shape[1]
    mask[0, :4] = 0
    expected = logits(model, attention_mask=mask)

    def second_part(later: torch.Tensor | None) -> torch.Tensor:
        cache = ResQCache(model.config)
        logits(model, IDS[:, :15], attention_mask=mask[:, :15], cache=cache)
        return logits(model, IDS[:, 15:], attention_mask=later, cache=cache)

    for later in (mask, None):
        assert torch.equal(second_part(later), expected[:, 15:])
    with pytest.raises(ValueError, match="a token cannot be hidden or shown later"):
        second_part(torch.ones(1, columns))


@pytest.mark.parametrize("kv_bits", ATTENTION)
def test_shapes_of_ids_and_embeddings(folders: dict[int, Path], kv_bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[kv_bits])
    ids = IDS.repeat(2, 1)
    for wrong in (ids[:0], ids[:, :0], ids[:0, :0], ids[0], ids[None]):
        with pytest.raises(ValueError, match=r"ResQ: input_ids: expected \[B, L\], not empty, got"):
            logits(model, wrong)
    embedded = model.get_input_embeddings()(ids)
    for wrong in (embedded[:0], embedded[:, :0], embedded[0]):
        with pytest.raises(ValueError, match=r"ResQ: inputs_embeds: expected \[B, L, hidden size"):
            model(inputs_embeds=wrong)


def test_shapes_of_positions(model: Any) -> None:
    ids, own = IDS.repeat(2, 1), torch.arange(IDS.shape[1])
    expected = logits(model, ids)
    for positions in (own, own[None], own.expand(2, -1)):
        assert torch.equal(logits(model, ids, position_ids=positions), expected)
    for positions in (own[None, :7], own.expand(3, -1), torch.arange(40)[None]):
        with pytest.raises(ValueError, match=r"position_ids: expected \[1 or 2, 25\], .* got"):
            logits(model, ids, position_ids=positions)


def test_packed_sequences_are_refused_with_and_without_a_cache(model: Any) -> None:
    positions = torch.cat([torch.arange(15), torch.arange(10)])[None]
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"position_ids that restart .* are not supported"):
            logits(model, position_ids=positions, use_cache=use_cache)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        with pytest.raises(ValueError, match=f"ResQ: {name}: expected None, packed sequences"):
            logits(model, **{name: torch.tensor([0, 15, 25])})


def test_tracing(folders: dict[int, Path]) -> None:
    """A trace makes constants of what pages hold; over floats it is right for other inputs."""

    class Logits(torch.nn.Module):
        def __init__(self, kv_bits: int) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(folders[kv_bits])

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return logits(self.model, ids, attention_mask=mask, use_cache=False)

    with pytest.raises(RuntimeError, match=r"expected a call, got torch\.jit\.trace"):
        torch.jit.trace(Logits(4), (IDS, torch.ones_like(IDS)))
    eager = Logits(16)
    traced = torch.jit.trace(eager, (IDS, torch.ones_like(IDS)))
    ids = torch.arange(60, 100).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.testing.assert_close(traced(ids, mask)[mask == 1], eager(ids, mask)[mask == 1])


def test_a_state_dict_is_saved_or_refused(model: Any, tmp_path: Path) -> None:
    expected, own = logits(model), model.state_dict()
    model.save_pretrained(tmp_path, True, own)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    rest = {key: value for key, value in own.items() if key != name}
    for other, got in (
        ({**own, name: 2 * own[name]}, f"another {name}"),
        ({**own, name: own[name].half()}, f"another {name}"),
        (rest, f"no {name}"),
        ({**own, "more": torch.ones(1)}, "another more"),
    ):
        with pytest.raises(ValueError, match=f"save_pretrained: state_dict: expected .* got {got}"):
            model.save_pretrained(tmp_path / "other", state_dict=other)
    assert not (tmp_path / "other").exists()
    twin = copy.deepcopy(model)
    twin.load_state_dict({**own, name: 2 * own[name]})
    twin.save_pretrained(tmp_path, state_dict=twin.state_dict())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(twin))
    assert not torch.equal(logits(twin), expected)


def test_logits_to_keep_and_positions(model: Any) -> None:
    expected = logits(model)
    for keep, columns in ((3, slice(-3, None)), (torch.tensor([0, 7]), torch.tensor([0, 7]))):
        torch.testing.assert_close(logits(model, logits_to_keep=keep), expected[:, columns])
    positions = torch.arange(0, 2 * IDS.shape[1], 2)[None]
    moved = logits(model, position_ids=positions)
    assert torch.equal(logits(model, position_ids=positions.int()), moved)
    with fake_quantized(model):
        reference = logits(model, position_ids=positions)
    assert (moved - reference).norm() < 0.15 * reference.norm()
    assert (moved - expected).norm() > 0.3 * expected.norm()


def test_dtypes(folders: dict[int, Path]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(folders[4], dtype=dtype)
        assert loaded.dtype == logits(loaded).dtype == dtype
    for other in (torch.float64, torch.int8, "float64"):
        with pytest.raises(ValueError, match=r"ResQ: dtype: expected float32, .* got (flo|int8)"):
            AutoModelForCausalLM.from_pretrained(folders[4], dtype=other)


def test_another_quantization_config_is_refused(folders: dict[int, Path]) -> None:
    entry = json.loads((folders[4] / "config.json").read_text())["quantization_config"]
    for other in (ResQConfig(kv_bits=16), {**entry, "kv_bits": 16}, BitsAndBytesConfig()):
        with pytest.raises(ValueError, match="quantized with ResQQuantizationConfig but you are"):
            AutoModelForCausalLM.from_pretrained(folders[4], quantization_config=other)
    for name in ("load_in_8bit", "load_in_4bit", "unknown"):
        with pytest.raises(TypeError, match=name):
            AutoModelForCausalLM.from_pretrained(folders[4], **{name: True})


def test_ids(model: Any) -> None:
    expected = logits(model)
    assert torch.equal(logits(model, IDS.int()), expected)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS.int(), max_new_tokens=4, do_sample=False), tokens)
    for dtype in (torch.uint8, torch.int16, torch.float32):
        with pytest.raises(RuntimeError, match="embedding: ids: expected int64, got"):
            logits(model, IDS.to(dtype))
    for ids, got in ((IDS + 1000, 1005), (-IDS, -5)):
        with pytest.raises(RuntimeError, match=f"ids: expected 0 to {model.vocab_size - 1}, got"):
            logits(model, ids)
        with pytest.raises(RuntimeError, match=f"got {got}"):
            logits(model, ids.int())


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_weights_answer_their_shape_only(tied: bool) -> None:
    model = random_quantized("llama", tie_word_embeddings=tied).to(torch.bfloat16)
    shape = (model.config.vocab_size, model.config.hidden_size)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        assert isinstance(weight, WeightView) and weight.shape == weight.size() == shape
        assert weight.dtype == torch.bfloat16 and weight.device == model.device
        assert not weight.requires_grad and weight.numel() == shape[0] * shape[1]
        assert repr(weight).startswith("WeightView(ResQ") and "weight" not in vars(module)
        for use in (lambda w: w[3], lambda w: w.data.zero_(), torch.sum, torch.Tensor.float):
            with pytest.raises(RuntimeError, match=r"weight: expected .* dequantize\(\)"):
                use(weight)
        with pytest.raises(AttributeError):
            module.weight = torch.zeros(shape)
        with pytest.raises(KeyError):
            module.weight = torch.nn.Parameter(torch.zeros(shape))
    assert model.model.layers[0].mlp.down_proj.weight.shape == (shape[1], 192)


def test_resize_token_embeddings(model: Any) -> None:
    expected, size = logits(model), model.config.vocab_size
    for same in (None, size):
        assert model.resize_token_embeddings(same) is model.get_input_embeddings()
    model.tie_weights()
    assert torch.equal(logits(model), expected) and model.config.vocab_size == size
    for other in (size + 8, size - 8):
        with pytest.raises(TypeError, match="ResQEmbedding"):
            model.resize_token_embeddings(other)
    assert torch.equal(logits(model), expected) and model.config.vocab_size == size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_bits", [8, 16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_num_parameters_and_footprint(model_type: str, embedding_bits: int, tied: bool) -> None:
    options = ResQConfig(embedding_bits=embedding_bits)
    model = random_quantized(model_type, options, tie_word_embeddings=tied)
    like = getattr(transformers, f"{FAMILIES[model_type]}ForCausalLM")(model.config)
    if tied and embedding_bits == 8:  # stored once
        like.lm_head.weight = like.model.embed_tokens.weight
    for exclude in (False, True):
        expected = like.num_parameters(exclude_embeddings=exclude)
        if exclude and tied and embedding_bits == 8:
            assert expected == like.num_parameters() - like.model.embed_tokens.weight.numel()
        assert model.num_parameters(exclude_embeddings=exclude) == expected
    assert model.num_parameters(only_trainable=True) == 0
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert model.get_memory_footprint() == sum(held.values())
    assert model.get_memory_footprint() < 0.5 * like.get_memory_footprint()


def test_a_replaced_embedding_is_used_and_not_saved(model: Any, tmp_path: Path) -> None:
    expected, size = logits(model), (model.config.vocab_size, model.config.hidden_size)
    own = model.get_input_embeddings(), model.get_output_embeddings()
    vectors = own[0](torch.arange(size[0]))
    with torch.no_grad():
        given = model(inputs_embeds=vectors[IDS]).logits  # in the float model's basis, like vectors
    model.set_input_embeddings(torch.nn.Embedding(*size, _weight=vectors))
    assert torch.equal(logits(model), given)
    with pytest.raises(ValueError, match="save_pretrained: embed_tokens: expected the quantized"):
        model.save_pretrained(tmp_path)
    model.set_input_embeddings(own[0])
    model.set_output_embeddings(torch.nn.Linear(size[1], size[0], bias=False))
    assert not torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="save_pretrained: lm_head: expected .* got a Linear"):
        model.save_pretrained(tmp_path)
    model.set_output_embeddings(own[1])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
