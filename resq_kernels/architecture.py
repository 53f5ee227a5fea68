"""Where things live in a Llama or Qwen2 checkpoint: names and sizes, no code of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resq_kernels.formats import split_columns

SUPPORTED = ("llama", "qwen2")
"""`model_type` of the configurations that this package reads."""

EMBEDDING_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"
EMBEDDING = f"{EMBEDDING_MODULE}.weight"
FINAL_NORM = "model.norm.weight"
HEAD = f"{HEAD_MODULE}.weight"
HEAD_GAIN = f"{HEAD_MODULE}.gain"
BASIS_MODULE = "model.hidden_basis"
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

        Raises:
            ValueError: another architecture, or an option that changes the computation in a way
                this package does not support; the message names the key.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED:
            raise ValueError(
                f"config.json: model_type: expected one of {', '.join(SUPPORTED)}, "
                f"got {model_type!r}"
            )
        for key, value in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("use_sliding_window", False),
        ):
            if config.get(key, value) != value:
                raise ValueError(f"config.json: {key}: expected {value!r}, got {config[key]!r}")
        missing = [key for key in _SIZES if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)}: expected a size, got nothing")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_key_value_heads: expected a divisor of {heads}, got {kv_heads}"
            )
        return cls(
            model_type=model_type,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=model_type == "qwen2",
            tied=bool(config.get("tie_word_embeddings", False)),
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

    def k_hi(self, name: str, high_fraction: float) -> int:
        """INT8 columns of a linear; none in down_proj, whose input is rotated online.

        Raises:
            ValueError: the split is not whole; the message names the linear.
        """
        if name == DOWN_PROJ:
            return 0
        if name == O_PROJ:
            # Every head keeps the same share, so that tensor parallel can slice by heads.
            return self.heads * split_columns(self.head_dim, high_fraction, f"{name}: a head")[1]
        return split_columns(self.linear(name)[1], high_fraction, name)[1]

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


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def layer_prefix(layer: int) -> str:
    """The prefix of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."
