"""Keys of config.json: what changes the function is computed or refused, the rest passes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_models import LLAMA3_ROPE, MODELS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from resq_kernels import architecture
from resq_kernels.architecture import ModelShape
from resq_kernels.ptq.decoder import rope_tables
from resq_kernels.ptq.source import SourceModel, check_class
from resq_kernels.testing.tiny_models import make_model, save_tiny_model

MODEL_TYPES = architecture.SUPPORTED


def known(model_type: str) -> set[str]:
    keys = architecture.READ_KEYS | architecture.HARMLESS_KEYS | architecture.WINDOW_KEYS
    return keys | set(architecture.SHARED_KEYS) | set(architecture.FIXED_KEYS[model_type])


def settings(model_type: str = "llama", **changes: object) -> dict[str, Any]:
    """The config.json of a tiny model, changed."""
    return make_model(model_type).config.to_dict() | changes


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_of_the_class_is_known(model_type: str) -> None:
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    assert fields - known(model_type) == set()


# Keys that transformers looks for and does not find in a configuration of these models, while it
# loads, runs and generates: what each does instead of changing the logits.
LOOKED_FOR = {
    "rope": {"rope_theta", "partial_rotary_factor", "_rope_type_labels"},
    "loading": {"transformers_weights", "quantization_config", "auto_map", "distributed_config"},
    "fused kernels, of the same function": {"fusion_config"},
    "which kernel attends": {
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
    },
    "experts": {"_experts_implementation", "_experts_implementation_internal"},
    "set by per_layer_config": {"_heterogeneity_spec"},
    "a check that sizes agree": {"num_heads", "embed_dim"},
    "training": {"gradient_checkpointing"},
    "layers of other kinds, by layer_types": {"mtp_layer_types", "number_of_conv_states"},
    "pictures": {"vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"},
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_that_transformers_looks_for_is_known(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationConfig

    kind = CONFIG_MAPPING[model_type]
    found, asked = kind.__getattribute__, set()

    def ask(self: object, name: str) -> object:
        asked.add(name)
        return found(self, name)

    save_tiny_model(tmp_path / "model", **MODELS[model_type])
    monkeypatch.setattr(kind, "__getattribute__", ask)
    ids = torch.randint(0, 256, (2, 8))
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation=attention
        )
        model(ids, attention_mask=torch.ones(2, 8), labels=ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    monkeypatch.undo()
    assert {"is_causal", "sliding_window", "text_config", "rope_theta"} <= asked
    keys = {name for name in asked if not hasattr(kind, name) and not name.startswith("__")}
    keys -= set(GenerationConfig().to_dict()) | set.union(*LOOKED_FOR.values())
    instance = set(vars(kind()))  # set by the class itself
    assert keys - known(model_type) - instance == set()


HARMLESS = {
    "_name_or_path": "a/b",
    "unsloth_fixed": True,
    "transformers_version": "4.31.0",
    "model_name": "x",
    "logit_scale": 2.0,
    "residual_multiplier": 0.5,
    "attn_logit_softcapping": 30.0,
    "pretraining_tp": 2,
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "chunk_size_feed_forward": 4,
    "use_cache": False,
    "tie_word_embeddings": False,
    "hidden_act": "swish",
    "rope_theta": 12345.0,
    "auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]},
    "is_decoder": True,
    "add_cross_attention": True,
    "num_labels": 3,
    "pad_token_id": -1,
    "is_encoder_decoder": None,
}


@pytest.mark.parametrize("key", HARMLESS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_without_effect_passes(model_type: str, key: str, tmp_path: Path) -> None:
    """The logits of transformers do not depend on it, and the shape is that without it."""
    content = settings(model_type)
    if key == "rope_theta":
        del content["rope_parameters"]
    changed = content | {key: HARMLESS[key]}
    check_class(changed)
    assert ModelShape.from_config(changed) == ModelShape.from_config(content)
    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(changed, default=str))
    ids = torch.randint(0, 256, (1, 8))
    SourceModel(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        same = torch.equal(loaded(ids).logits, model(ids).logits)
    assert same == (key != "rope_theta")


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 512}),
        ("qwen2", {"attention_bias": True}),
        ("qwen2", {"attention_bias": False}),
        ("qwen2", {"mlp_bias": True}),
        ("qwen2", {"sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"mlp_bias": True, "sliding_window": 64}),
        ("qwen3", {"no_rope_layers": [0, 0]}),
        ("smollm3", {"no_rope_layers": [1, 0, 0], "no_rope_layer_interval": 5}),
        ("llama", {"use_sliding_window": True}),
        ("llama", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_keys_of_the_other_type_pass(model_type: str, change: dict[str, object]) -> None:
    content = settings(model_type)
    assert ModelShape.from_config(content | change) == ModelShape.from_config(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu' or 'swish', got 'gelu'"),
        ({"attention_bias": 1}, "attention_bias: expected False or True, got 1"),
        ({"mlp_bias": None}, "mlp_bias: expected False or True, got None"),
        ({"sliding_window": 16}, "sliding_window: expected None, got 16"),
        ({"is_causal": False}, "is_causal: expected True, got False"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: expected False or None, got True"),
        ({"attention_chunk_size": 8}, "attention_chunk_size: expected None, got 8"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config: expected None, got {'0': {}}"),
        ({"text_config": {}}, "text_config: expected None, got {}"),
        *(
            ({"layer_types": kinds}, 'layer_types: expected a list of "full_attention" alone, go')
            for kinds in (["sliding_attention"], ["full_attention", 3], "full_attention", 3, {})
        ),
        # The embedding of transformers' class cannot be made with it.
        ({"pad_token_id": 320}, "pad_token_id: expected a token of 320 (vocab_size), got 320"),
        ({"pad_token_id": -321}, "pad_token_id: expected a token of 320 (vocab_size), got -321"),
        (
            {"model_type": "gemma2"},
            "model_type: expected one of llama, mistral, qwen2, qwen3, smollm3, got 'gemma2'",
        ),
        *(
            (
                {"model_type": kind, "use_sliding_window": True},
                "use_sliding_window: expected False, ",
            )
            for kind in ("qwen2", "qwen3", "smollm3")
        ),
        *(
            (
                {"model_type": "mistral", "sliding_window": window},
                "sliding_window: expected null, or at least max_position_embeddings (512) since "
                f"our attention sees all tokens, got {window!r}",
            )
            for window in (511, True, "4096")
        ),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim: expected a size, got nothing"),
        *(
            (
                {"model_type": "smollm3", "no_rope_layers": turned},
                f"no_rope_layers: expected 0 or 1 for each of 2 layers, got {turned!r}",
            )
            for turned in ([1], [1, 2], 4)
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval: expected a positive integer, got 0",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type: expected one of default, linear, dyna"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type: expected one of default"),
        ({"rope_scaling": "linear"}, "rope_parameters: expected one set of values, got 'linear'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters: expected one set of values",
        ),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta: expected a positive number, go"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta: expected a positive number, go"),
        (
            {"rope_scaling": {"type": "linear", "factor": True}},
            "factor: expected a positive number, got True",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 (these models turn"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor: expected 1 (these models turn whole heads), got 0.25",
        ),
        ({"hidden_size": 130}, "hidden_size: expected a multiple of num_attention_heads (4), got"),
        ({"head_dim": 63}, "head_dim: expected an even number (RoPE turns pairs), got 63"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number, got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number, got nan"),
        *(
            ({key: value}, f"{key}: expected a positive integer, got {value!r}")
            for key, value in (
                ("hidden_size", 128.0),
                ("intermediate_size", "192"),
                ("num_hidden_layers", 0),
                ("num_attention_heads", True),
                ("num_key_value_heads", 0),
                ("head_dim", -64),
                ("vocab_size", [320]),
            )
        ),
        ({"vocab_size": None}, "vocab_size: expected a size, got nothing"),
    ],
)
def test_what_changes_the_function_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"config.json: {words}")):
        ModelShape.from_config(settings(**change))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_key_and_value_heads_that_are_not_said(model_type: str) -> None:
    """The classes of transformers disagree."""
    content = settings(model_type, num_attention_heads=64, hidden_size=4096)
    del content["num_key_value_heads"]
    expected = CONFIG_MAPPING[model_type](**content).num_key_value_heads
    assert ModelShape.from_config(content).kv_heads == expected
    ours = {"llama": 64, "mistral": 8, "qwen2": 32, "qwen3": 32, "smollm3": 4}
    assert expected == ours[model_type]
    assert ModelShape.from_config(content | {"num_key_value_heads": None}).kv_heads == 64


def test_layers_without_rope() -> None:
    """Every fourth one, unless config.json says otherwise."""
    for change, unturned in (
        ({}, {3, 7}),
        ({"no_rope_layer_interval": 2}, {1, 3, 5, 7}),
        ({"no_rope_layers": [0, *9 * [1]]}, {0}),
    ):
        content = settings("smollm3", num_hidden_layers=8, layer_types=None)
        del content["no_rope_layers"], content["no_rope_layer_interval"]
        content |= change
        theirs = CONFIG_MAPPING["smollm3"](**content).no_rope_layers[:8]
        assert ModelShape.from_config(content).unturned == unturned
        assert {layer for layer in range(8) if not theirs[layer]} == unturned


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_keys_that_are_not_there_have_the_defaults_of_the_class(model_type: str) -> None:
    content = settings(model_type)
    for key in ("head_dim", "tie_word_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias"):
        content.pop(key, None)
    made, shape = CONFIG_MAPPING[model_type](**content), ModelShape.from_config(content)
    width = content["hidden_size"] // content["num_attention_heads"]
    assert shape.head_dim == getattr(made, "head_dim", width)
    assert (shape.tied, shape.norm_eps) == (made.tie_word_embeddings, made.rms_norm_eps)
    assert shape.biased == (architecture.QKV if model_type == "qwen2" else ())
    if model_type == "mistral":  # a window of 4096 tokens
        del content["sliding_window"], content["max_position_embeddings"]
        with pytest.raises(ValueError, match=r"max_position_embeddings \(131072\) since .* 4096"):
            ModelShape.from_config(content)


@pytest.mark.parametrize("auto_map", [{"AutoConfig": "a.B"}, {"AutoModel": "a.B"}, "a.B"])
def test_custom_code_is_refused(auto_map: object) -> None:
    with pytest.raises(ValueError, match="auto_map: expected a model of transformers itself"):
        check_class(settings(auto_map=auto_map))


def test_a_key_that_a_later_class_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(CONFIG_MAPPING["llama"]):
        depth_scale: float = 1.0

    content = settings()
    monkeypatch.setattr(type(CONFIG_MAPPING), "__getitem__", lambda self, key: Later)
    check_class(content | {"depth_scale": 1.0})
    with pytest.raises(ValueError, match="depth_scale: expected 1.0, got 2.0"):
        check_class(content | {"depth_scale": 2.0})


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "old name": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 64,
    },
    "llama3": LLAMA3_ROPE,
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", **MODELS["llama"])
    content = json.loads((folder / "config.json").read_text())
    del content["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(content | {"rope_scaling": ROPES[case]}))
    model = SourceModel(folder)
    cos, sin = rope_tables(model.reader.config, folder, 48)
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    exact = rotary(torch.zeros(1, 1), torch.arange(48)[None])
    assert torch.equal(cos, exact[0][0]) and torch.equal(sin, exact[1][0])
    assert cos.shape == (48, model.shape.head_dim)
