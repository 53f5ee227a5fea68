"""Where things live in a Llama or Qwen2 checkpoint: names and sizes, no code of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resq_kernels.config import HADAMARD_BLOCK, ResQConfig

SUPPORTED = ("llama", "qwen2")
"""`model_type` of the configurations that this package reads."""

DECODER_PREFIX = "model."
"""Of the names of a language model's tensors; files of its decoder alone lack it."""
EMBEDDING_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"
EMBEDDING = f"{EMBEDDING_MODULE}.weight"
FINAL_NORM = "model.norm.weight"
HEAD = f"{HEAD_MODULE}.weight"
HEAD_GAIN = f"{HEAD_MODULE}.gain"
BASIS_MODULE = f"{EMBEDDING_MODULE}.basis"
BASIS_ROTATION, BASIS_GAIN = f"{BASIS_MODULE}.rotation", f"{BASIS_MODULE}.gain"
GUARD = "model.layers.0.self_attn.q_proj.weight"
"""A tensor without elements under the name of a float weight: a loader that does not know the
format would fill in random weights, and stops at its shape."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN_PROJ = "mlp.down_proj"
LINEARS = (*QKV, O_PROJ, *GATE_UP, DOWN_PROJ)
"""The seven quantized linears of a decoder layer, in forward order."""

ATTENTION_NORM = "input_layernorm"
MLP_NORM = "post_attention_layernorm"
NORMS = (ATTENTION_NORM, MLP_NORM)
KEY_ROTATION = "self_attn.key_rotation"


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
)
READ_KEYS = frozenset(
    {*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"}
    | {"rope_parameters", "max_position_embeddings", "dtype", "pad_token_id"}
)
"""Keys that the quantizer reads."""

HARMLESS_KEYS = frozenset(
    {"transformers_version", "architectures", "id2label", "label2id", "problem_type"}
    | {"output_hidden_states", "return_dict", "use_cache", "initializer_range", "pretraining_tp"}
    | {"bos_token_id", "eos_token_id", "attention_dropout"}
    | {"chunk_size_feed_forward"}
)
"""Keys of transformers' classes that do not change the logits of these models."""

FIXED_KEYS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        # The class has no such key, but transformers' cache then forgets what lies further back.
        "sliding_window": (None,),
    },
    # q, k and v always have biases and o_proj never, whatever attention_bias says; sliding_window
    # and max_window_layers have no effect without use_sliding_window.
    "qwen2": {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)},
}
"""model_type -> key -> the values of config.json that are supported; the first is the default."""

SHARED_KEYS: Mapping[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_causal": (True,),
    **dict.fromkeys(
        ("attention_chunk_size", "kv_sharing_modes", "per_layer_config", "mlp_layer_types")
        # A part that transformers takes for the language model's own configuration.
        + ("text_config", "decoder", "generator", "text_encoder"),
        (None,),
    ),
}
"""Likewise, of keys that masks, caches and configurations read whatever the model is."""

WINDOW_KEYS = frozenset({"sliding_window", "max_window_layers", "layer_types"})
"""Keys of windowed attention: checked where they have an effect."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a supported model.

    Attributes:
        model_type: one of `SUPPORTED`.
        hidden, intermediate, vocab: widths of the residual stream, of the MLP and of the head.
        layers, heads, kv_heads, head_dim: decoder layers, query heads, key/value heads, their size.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: whether q_proj, k_proj and v_proj have a bias.
        tied: whether the head shares the embedding's matrix in the source checkpoint.
    """

    model_type: str
    hidden: int
    intermediate: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads a config.json.

        The rule for its keys: what this function does not read must not change what transformers
        computes. The keys of transformers' own class are read here, or are in `FIXED_KEYS` and must
        have a value that is supported, or are in `HARMLESS_KEYS`. Of the keys that the class does
        not have, transformers' shared code reads `SHARED_KEYS`, which must have the given values
        too. No other key has an effect in `LlamaForCausalLM` or `Qwen2ForCausalLM`, whatever it
        meant where the checkpoint was made, and all of them pass.

        Raises:
            ValueError: another architecture, a value of the wrong type, or an option that changes
                the computation in a way this package does not support; the message names the key.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED:
            raise ValueError(
                f"config.json: model_type: expected one of {', '.join(SUPPORTED)}, "
                f"got {model_type!r}"
            )
        _check_fixed(config, {**SHARED_KEYS, **FIXED_KEYS[model_type]})
        _check_rope(config)
        sizes = {key: _size(config, key) for key in _SIZES}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        # Without the key transformers takes 32 for a Qwen2; null is as many as there are queries.
        absent = model_type == "qwen2" and "num_key_value_heads" not in config
        kv_heads = _size(config, "num_key_value_heads", 32 if absent else heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads: expected a divisor of {heads}, got {kv_heads}"
            )
        if hidden % heads and model_type == "llama":
            raise ValueError(
                f"config.json: hidden_size: expected a multiple of num_attention_heads ({heads}), "
                f"got {hidden}"
            )
        head_dim = _size(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(
                f"config.json: head_dim: expected an even number (RoPE turns pairs), got {head_dim}"
            )
        vocab, pad = sizes["vocab_size"], config.get("pad_token_id")
        if isinstance(pad, int) and not -vocab <= pad < vocab:
            raise ValueError(
                f"config.json: pad_token_id: expected a token of {vocab} (vocab_size), got {pad}"
            )
        eps, tied = config.get("rms_norm_eps", 1e-6), config.get("tie_word_embeddings", False)
        if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 <= eps < math.inf:
            raise ValueError(f"config.json: rms_norm_eps: expected a number, got {eps!r}")
        if not isinstance(tied, bool):
            raise ValueError(
                f"config.json: tie_word_embeddings: expected true or false, got {tied!r}"
            )
        return cls(
            model_type=model_type,
            hidden=hidden,
            intermediate=sizes["intermediate_size"],
            vocab=vocab,
            layers=sizes["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(eps),
            qkv_bias=model_type == "qwen2",
            tied=tied,
        )

    def linear(self, name: str) -> tuple[int, int]:
        """(rows, columns) of one of `LINEARS`."""
        kv_width, q_width = self.kv_heads * self.head_dim, self.heads * self.head_dim
        return {
            "self_attn.q_proj": (q_width, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            O_PROJ: (self.hidden, q_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            DOWN_PROJ: (self.hidden, self.intermediate),
        }[name]

    def k_hi(self, name: str, config: ResQConfig) -> int:
        """INT8 columns of a linear.

        In down_proj, whose input is transformed online: those that are left of whole blocks
        (`hadamard_block`); none where the whole row is transformed.

        Raises:
            ValueError: the split is not whole; the message names the linear.
        """
        from resq_kernels.formats import split_columns  # needs torch, `resq bench --help` does not

        high_fraction = config.high_fraction
        if name == DOWN_PROJ:
            block = self.hadamard_block(config)
            return self._beside_blocks(high_fraction, block) if block else 0
        if name == O_PROJ:
            # Every head keeps the same share, so that tensor parallel can slice by heads.
            return self.heads * split_columns(self.head_dim, high_fraction, f"{name}: a head")[1]
        return split_columns(self.linear(name)[1], high_fraction, name)[1]

    def hadamard_block(self, config: ResQConfig) -> int:
        """Columns of a block of the Hadamard transform of down_proj's input; 0: the whole row.

        The largest power of two from 8 to `config.hadamard_block` (256 by default) that costs at
        most a third more INT8 columns than `config.high_fraction` of the row, or else 8.
        """
        block = config.hadamard_block
        if block is None:
            block = HADAMARD_BLOCK if config.high_fraction else 0
        most = 4 / 3 * config.high_fraction * self.intermediate + 1e-6
        while block > 8 and self._beside_blocks(config.high_fraction, block) > most:
            block //= 2
        return block

    def _beside_blocks(self, high_fraction: float, block: int) -> int:
        """Columns of down_proj beside as many whole blocks as fit the others."""
        low = math.floor((1 - high_fraction) * self.intermediate + 1e-6)
        return self.intermediate - low // block * block

    def source_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every tensor that a 16-bit checkpoint must hold."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab, self.hidden),
            FINAL_NORM: (self.hidden,),
        }
        if not self.tied:
            shapes[HEAD] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = layer_prefix(layer)
            for name in NORMS:
                shapes[f"{prefix}{name}.weight"] = (self.hidden,)
            for name in LINEARS:
                shapes[f"{prefix}{name}.weight"] = self.linear(name)
            for name in QKV if self.qkv_bias else ():
                shapes[f"{prefix}{name}.bias"] = (self.linear(name)[0],)
        return shapes


def layer_prefix(layer: int) -> str:
    """The prefix of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[object, ...]]) -> None:
    for key, allowed in fixed.items():
        value = config.get(key, allowed[0])
        # 0 == False, and no config.json means the one by the other.
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            expected = " or ".join(repr(one) for one in allowed)
            raise ValueError(f"config.json: {key}: expected {expected}, got {value!r}")
    layers = config.get("layer_types")
    kinds = ["full_attention"] if layers is None else layers
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(
            f'config.json: layer_types: expected a list of "full_attention" alone, got {layers!r}'
        )


def _check_rope(config: Mapping[str, Any]) -> None:
    """Refuses RoPE that Llama and Qwen2 of transformers do not have; they compute the tables."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config.json: rope_parameters: expected one set of values, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"config.json: rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}"
        )
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = rope.get(key, config.get(key))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"config.json: {key}: expected a positive number, got {value!r}")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise ValueError(
            "config.json: partial_rotary_factor: expected 1 (these models turn whole heads), "
            f"got {part!r}"
        )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json: {key}: expected a size, got nothing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key}: expected a positive integer, got {value!r}")
    return value
