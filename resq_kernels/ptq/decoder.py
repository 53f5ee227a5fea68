"""One decoder layer in float32, cut at the inputs of its linears.

Calibration takes the inputs from this layer; GPTQ takes them from the rounded one (`rounded.py`),
or with `hessian_inputs` "exact" from this one with the weights that are rounded already.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from resq_kernels import hadamard, reference
from resq_kernels.architecture import (
    ATTENTION_NORM,
    DOWN_PROJ,
    FAMILIES,
    GATE_UP,
    HEAD_NORMS,
    K_PROJ,
    MLP_NORM,
    O_PROJ,
    Q_PROJ,
    V_PROJ,
    ModelShape,
)
from resq_kernels.formats import QuantizedWeight
from resq_kernels.head_norm import head_norm

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Layer:
    """The parameters of one decoder layer, float32; weights and biases may be bfloat16.

    Attributes:
        weights: name of a linear -> [rows, columns].
        biases: name of a linear -> [rows]; only those that exist.
        norms: name of a norm -> gain [width]; without those that are folded into the linears.
        key_rotation: float16 [1, head_dim, head_dim] applied to queries and keys after RoPE.
        o_order: column order of o_proj: its input is `attention[..., o_order]`.
        hadamard: whether down_proj's input goes through the Hadamard transform.
        hadamard_block: of how many columns each; 0: the whole row.
        down_high: the last columns of down_proj, which are not transformed in blocks.
        turned: whether RoPE turns queries and keys.
    """

    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    key_rotation: torch.Tensor | None = None
    o_order: torch.Tensor | None = None
    hadamard: bool = False
    hadamard_block: int = 0
    down_high: int = 0
    turned: bool = True

    def to(self, device: str, products: torch.dtype = torch.float32) -> Layer:
        """The same layer on a device, weights and biases in the dtype `products`."""

        def move(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

        return Layer(
            move(self.weights, products),
            move(self.biases, products),
            move(self.norms, torch.float32),
            None if self.key_rotation is None else self.key_rotation.to(device),
            None if self.o_order is None else self.o_order.to(device),
            self.hadamard,
            self.hadamard_block,
            self.down_high,
            self.turned,
        )


def product_dtype(source: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which the float model's linears are computed: bfloat16 if the source's weights
    are and the device has instructions for it, which take half the time or less; else float32."""
    if source != torch.bfloat16:
        return torch.float32
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def rope_tables(config: Mapping[str, Any], folder: Path, seqlen: int) -> Rope:
    """Cosine and sine [seqlen, head_dim] of positions 0 .. seqlen - 1, float32.

    transformers' own class computes them, so every RoPE scaling that it knows is supported.
    """
    from transformers import AutoConfig

    model_type = config["model_type"]
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    rotary = getattr(module, f"{FAMILIES[model_type]}RotaryEmbedding")(
        AutoConfig.from_pretrained(folder)
    )
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(seqlen)[None])
    return cos[0].float(), sin[0].float()


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """RoPE of x [..., seqlen, head_dim]; the tables may be longer."""
    return reference.apply_rope(x, *(table[: x.shape[-2]].to(x.device) for table in rope))


class DecoderLayer:
    """The steps of a decoder layer between the inputs of its linears.

    Every method takes and returns float32 [windows, seqlen, features]. A linear with a bfloat16
    weight rounds its input and output to bfloat16.

    Args:
        shape: sizes of the model.
        layer: its parameters.
        rope: tables of `rope_tables`.

    Attributes:
        rope: those by which this layer turns queries and keys.
    """

    def __init__(self, shape: ModelShape, layer: Layer, rope: Rope) -> None:
        self.shape, self.layer = shape, layer
        self.rope = rope if layer.turned else (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))

    def qkv_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input of q_proj, k_proj and v_proj."""
        return reference.rms_norm(x, self.layer.norms.get(ATTENTION_NORM), self.shape.norm_eps)

    def heads(self, qkv_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys after RoPE, and values, [windows, heads, seqlen, head_dim], exact."""
        values = self.split_heads(self.linear(qkv_input, V_PROJ))
        return self.turned(qkv_input, Q_PROJ), self.turned(qkv_input, K_PROJ), values

    def turned(
        self, qkv_input: torch.Tensor, name: str, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries or keys after RoPE, [windows, heads, tokens, head_dim], exact.

        Args:
            qkv_input: of the tokens at `places` of a window; None: from its start.
            name: of the linear, q_proj or k_proj.
        """
        heads = self.norm_head(self.split_heads(self.linear(qkv_input, name)), name)
        if places is None:
            return apply_rope(heads, self.rope)
        cos, sin = self.rope
        return apply_rope(heads, (cos[places], sin[places]))

    def norm_head(self, heads: torch.Tensor, name: str) -> torch.Tensor:
        """Heads of a linear before RoPE: those of q_proj and k_proj normalized in the models that
        do so."""
        norm = HEAD_NORMS.get(name)
        if norm is None or not self.shape.head_norms:
            return heads
        return head_norm(heads, self.layer.norms[norm], self.shape.norm_eps)

    def rotate(
        self, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both times the key rotation, which leaves their products as they are."""
        if self.layer.key_rotation is None:
            return queries, keys
        rotation = self.layer.key_rotation[0].float()
        return queries @ rotation, keys @ rotation

    def mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Causal attention, [windows, seqlen, heads, head_dim]."""
        groups = self.shape.heads // self.shape.kv_heads
        keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """The input of o_proj, its columns in o_proj's order."""
        attended = self.mix(*self.rotate(queries, keys), values).flatten(2)
        return attended if self.layer.o_order is None else attended[..., self.layer.o_order]

    def o_input(self, qkv_input: torch.Tensor) -> torch.Tensor:
        """The input of o_proj, from the input of q, k and v."""
        return self.attend(*self.heads(qkv_input))

    def after_attention(self, x: torch.Tensor, o_input: torch.Tensor) -> torch.Tensor:
        """The residual stream between attention and MLP."""
        return x + self.linear(o_input, O_PROJ)

    def gate_up_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input of gate_proj and up_proj."""
        return reference.rms_norm(hidden, self.layer.norms.get(MLP_NORM), self.shape.norm_eps)

    def down_input(self, gate_up_input: torch.Tensor) -> torch.Tensor:
        """The input of down_proj."""
        return self.swiglu(*(self.linear(gate_up_input, name) for name in GATE_UP))

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SwiGLU of the outputs of gate_proj and up_proj and, in a rotated model, the Hadamard
        transform: the input of down_proj."""
        product, layer = functional.silu(gate).mul_(up), self.layer
        if not layer.hadamard:
            return product
        return hadamard.transform_low(product, layer.down_high, layer.hadamard_block)

    def output(self, hidden: torch.Tensor, down_input: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer."""
        return hidden + self.linear(down_input, DOWN_PROJ)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole layer."""
        hidden = self.after_attention(x, self.o_input(self.qkv_input(x)))
        return self.output(hidden, self.down_input(self.gate_up_input(hidden)))

    def round(self, names: tuple[str, ...], weight: QuantizedWeight) -> None:
        """Sets the weight, all rows in this order, of the linears that read one input."""
        rows = [self.shape.linear(name)[0] for name in names]
        self.layer.weights |= zip(names, weight.dequantize().split(rows), strict=True)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The output of a linear."""
        weight = self.layer.weights[name]
        return functional.linear(x.to(weight.dtype), weight, self.layer.biases.get(name)).float()

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[windows, seqlen, heads * head_dim] -> [windows, heads, seqlen, head_dim]."""
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
