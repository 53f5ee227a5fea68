"""Where things live in a supported model's checkpoint: names and sizes, no code of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resq_kernels.config import HADAMARD_BLOCK, ResQConfig

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
"""model_type -> how the names of its classes in transformers begin."""
SUPPORTED = tuple(FAMILIES)
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
BASIS_LINEARS = f"{BASIS_MODULE}.linears"
GUARD = "model.layers.0.self_attn.q_proj.weight"
"""A tensor without elements under the name of a float weight: a loader that does not know the
format would fill in random weights, and stops at its shape."""

Q_PROJ, K_PROJ, V_PROJ = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
QKV = (Q_PROJ, K_PROJ, V_PROJ)
O_PROJ = "self_attn.o_proj"
GATE_PROJ, UP_PROJ = "mlp.gate_proj", "mlp.up_proj"
GATE_UP = (GATE_PROJ, UP_PROJ)
DOWN_PROJ = "mlp.down_proj"
LINEARS = (*QKV, O_PROJ, *GATE_UP, DOWN_PROJ)
"""The seven quantized linears of a decoder layer, in forward order."""

ATTENTION_NORM = "input_layernorm"
MLP_NORM = "post_attention_layernorm"
NORMS = (ATTENTION_NORM, MLP_NORM)
"""Of the residual stream; methods that rotate fold their gains into the next linears."""
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"
HEAD_NORMS = {Q_PROJ: Q_NORM, K_PROJ: K_NORM}
"""Of every head of these linears' outputs, before RoPE, in models that have them."""
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
    | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}
)
"""Keys that the quantizer reads."""

HARMLESS_KEYS = frozenset(
    {"transformers_version", "architectures", "id2label", "label2id", "problem_type"}
    | {"output_hidden_states", "return_dict", "use_cache", "initializer_range", "pretraining_tp"}
    | {"bos_token_id", "eos_token_id", "attention_dropout"}
    | {"chunk_size_feed_forward"}
)
"""Keys of transformers' classes that do not change the logits of these models."""

_SILU, _FLAG = ("silu", "swish"), (False, True)
FIXED_KEYS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "llama": {
        "hidden_act": _SILU,
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
        # The class has no such key, but transformers' cache then forgets what lies further back.
        "sliding_window": (None,),
    },
    # Its sliding_window: `_check_window`.
    "mistral": {"hidden_act": _SILU},
    # q, k and v always have biases and o_proj never, whatever attention_bias says; sliding_window
    # and max_window_layers have no effect without use_sliding_window.
    "qwen2": {"hidden_act": _SILU, "use_sliding_window": (False,)},
    "qwen3": {"hidden_act": _SILU, "attention_bias": _FLAG, "use_sliding_window": (False,)},
    "smollm3": {
        "hidden_act": _SILU,
        "attention_bias": _FLAG,
        "mlp_bias": _FLAG,
        "use_sliding_window": (False,),
    },
}
"""model_type -> key -> the values of config.json that are supported; the first is the default."""

_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
"""model_type -> what its class takes for keys that are not in config.json, where that is neither
null nor what the others take."""

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
        biased: those of `LINEARS` that have a bias.
        tied: whether the head shares the embedding's matrix in the source checkpoint.
        head_norms: whether the queries and keys of every head pass an RMSNorm before RoPE.
        unturned: the layers whose queries and keys RoPE does not turn.
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
    biased: tuple[str, ...]
    tied: bool
    head_norms: bool = False
    unturned: frozenset[int] = frozenset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads a config.json.

        The rule for its keys: what this function does not read must not change what transformers
        computes. The keys of transformers' own class are read here, or are in `FIXED_KEYS` and must
        have a value that is supported, or are in `HARMLESS_KEYS`. Of the keys that the class does
        not have, transformers' shared code reads `SHARED_KEYS`, which must have the given values
        too. No other key has an effect in the classes of `FAMILIES`, whatever it meant where the
        checkpoint was made, and all of them pass.

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
        if model_type == "mistral":
            _check_window(config)
        config = {**_ABSENT.get(model_type, {}), **config}
        sizes = {key: _size(config, key) for key in _SIZES}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads: expected a divisor of {heads}, got {kv_heads}"
            )
        if hidden % heads and model_type == "llama":
            raise ValueError(
                f"config.json: hidden_size: expected a multiple of num_attention_heads ({heads}), "
                f"got {hidden}"
            )
        # Qwen3's class takes no null for it.
        head_dim = _size(config, "head_dim", None if model_type == "qwen3" else hidden // heads)
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
        layers = sizes["num_hidden_layers"]
        return cls(
            model_type=model_type,
            hidden=hidden,
            intermediate=sizes["intermediate_size"],
            vocab=vocab,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(eps),
            biased=_biased(model_type, config),
            tied=tied,
            head_norms=model_type == "qwen3",
            unturned=_unturned(config, layers) if model_type == "smollm3" else frozenset(),
        )

    @property
    def norms(self) -> dict[str, int]:
        """Name of every norm of a decoder layer -> its width."""
        widths = dict.fromkeys(NORMS, self.hidden)
        return widths | (
            dict.fromkeys(HEAD_NORMS.values(), self.head_dim) if self.head_norms else {}
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

        In down_proj, where its input is transformed online: those that are left of whole blocks
        (`hadamard_block`); none where the whole row is transformed.

        Raises:
            ValueError: the split is not whole; the message names the linear.
        """
        from resq_kernels.formats import split_columns  # needs torch, `resq bench --help` does not

        high_fraction = config.high_fraction
        if name == DOWN_PROJ and config.rotates:
            block = self.hadamard_block(config)
            return self._beside_blocks(high_fraction, block) if block else 0
        if name == O_PROJ:
            # Every head keeps the same share, so that tensor parallel can slice by heads.
            return self.heads * split_columns(self.head_dim, high_fraction, f"{name}: a head")[1]
        return split_columns(self.linear(name)[1], high_fraction, name)[1]

    def hadamard_block(self, config: ResQConfig) -> int:
        """Columns of a block of the Hadamard transform of down_proj's input; 0: the whole row, or
        nothing is transformed.

        The largest power of two from 8 to `config.hadamard_block` (256 by default) that costs at
        most a third more INT8 columns than `config.high_fraction` of the row, or else 8.
        """
        block = config.hadamard_block
        if block is None:
            block = HADAMARD_BLOCK if config.high_fraction and config.rotates else 0
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
            for name, width in self.norms.items():
                shapes[f"{prefix}{name}.weight"] = (width,)
            for name in LINEARS:
                shapes[f"{prefix}{name}.weight"] = self.linear(name)
            for name in self.biased:
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


def _check_window(config: Mapping[str, Any]) -> None:
    """Refuses a window of Mistral's attention that hides tokens; the defaults are its class's."""
    window, most = config.get("sliding_window", 4096), config.get("max_position_embeddings", 131072)
    numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in (window, most))
    if window is not None and not (numbers and window >= most):
        raise ValueError(
            f"config.json: sliding_window: expected null, or at least max_position_embeddings "
            f"({most}) since our attention sees all tokens, got {window!r}"
        )


def _biased(model_type: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `LINEARS` that have a bias."""
    if model_type == "qwen2":
        return QKV
    read = FIXED_KEYS[model_type]  # a class reads no other key
    attention, mlp = (key in read and config.get(key) for key in ("attention_bias", "mlp_bias"))
    return (QKV + (O_PROJ,) if attention else ()) + ((*GATE_UP, DOWN_PROJ) if mlp else ())


def _unturned(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """SmolLM3's layers without RoPE: every fourth one, unless config.json says otherwise."""
    turned = config.get("no_rope_layers")
    if turned is None:
        interval = _size(config, "no_rope_layer_interval", 4)
        turned = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers or any(x not in (0, 1) for x in turned):
        raise ValueError(
            f"config.json: no_rope_layers: expected 0 or 1 for each of {layers} layers, got "
            f"{turned!r}"
        )
    return frozenset(layer for layer in range(layers) if not turned[layer])


def _check_rope(config: Mapping[str, Any]) -> None:
    """Refuses RoPE that the classes of `FAMILIES` do not have; they compute the tables."""
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
