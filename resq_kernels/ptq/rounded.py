"""A decoder layer computed by the operators that run the quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from resq_kernels import kv_pages, ops
from resq_kernels.architecture import (
    ATTENTION_NORM,
    DOWN_PROJ,
    GATE_UP,
    KEY_ROTATION,
    LINEARS,
    MLP_NORM,
    O_PROJ,
    QKV,
    ModelShape,
    layer_prefix,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import MixedTensor, PackedWeight, QuantizedWeight, RowFormat, join_heads
from resq_kernels.ptq.decoder import DecoderLayer, Layer, Rope, apply_rope

GROUPS: tuple[tuple[str, ...], ...] = (QKV, (O_PROJ,), GATE_UP, (DOWN_PROJ,))
"""The linears that read one input."""


def stored_layer(
    load: Callable[[str], torch.Tensor], index: int, shape: ModelShape, config: ResQConfig
) -> tuple[Layer, dict[str, QuantizedWeight]]:
    """A quantized layer without its weights, and those, by name.

    Args:
        load: gives a tensor by its name in a checkpoint, on the device where the layer runs.
        index: which layer.
        shape: sizes of the model.
        config: how it was quantized.
    """
    prefix = layer_prefix(index)
    layer = Layer(
        weights={},
        biases={name: load(f"{prefix}{name}.bias").float() for name in shape.biased},
        norms={name: load(f"{prefix}{name}.weight").float() for name in shape.norms},
        key_rotation=load(prefix + KEY_ROTATION) if config.has_basis else None,
        hadamard=config.rotates,
        hadamard_block=shape.hadamard_block(config),
        down_high=shape.k_hi(DOWN_PROJ, config),
        turned=index not in shape.unturned,
    )
    return layer, {name: QuantizedWeight.read(load, prefix + name) for name in LINEARS}


class _Cached(NamedTuple):
    """Keys and values in a cache, and the queries that read them, as `ops.kv_attention` does."""

    queries: torch.Tensor  # float32 [windows * seqlen, heads, head_dim], after RoPE and rotation
    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


class RoundedLayer:
    """The steps of a decoder layer between the rounded inputs of its linears.

    The linears of a step are rounded (`round`) before the step that multiplies with them is
    called. Inputs are codes, states float32 [windows, seqlen, features]. Keys and values are
    rounded as the cache rounds them.

    Args:
        shape: sizes of the model.
        layer: its parameters.
        rope: tables of `rope_tables`.
        config: how inputs, keys and values are rounded.

    Attributes:
        float: the same layer without rounding.
        packed: the weights that were rounded, by the names of their linears.
    """

    def __init__(self, shape: ModelShape, layer: Layer, rope: Rope, config: ResQConfig) -> None:
        self.shape, self.layer, self.config = shape, layer, config
        self.float = DecoderLayer(shape, layer, rope)
        self.rope = self.float.rope
        self.packed: dict[tuple[str, ...], PackedWeight] = {}

    def round(self, names: tuple[str, ...], weight: QuantizedWeight) -> None:
        """Sets the weight, all rows in this order, of the linears that read one input."""
        self.packed[names] = PackedWeight.pack(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole layer."""
        hidden = self.after_attention(x, self.o_input(self.qkv_input(x)))
        return self.output(hidden, self.down_input(self.gate_up_input(hidden)))

    def qkv_input(self, x: torch.Tensor) -> MixedTensor:
        """The input of q_proj, k_proj and v_proj."""
        return self._normed(x, ATTENTION_NORM, QKV[0])

    def qkv(self, qkv_input: MixedTensor) -> torch.Tensor:
        """The outputs of q_proj, k_proj and v_proj, side by side."""
        return self.linear(qkv_input, QKV)

    def o_input(self, qkv_input: MixedTensor) -> MixedTensor:
        """The input of o_proj, from the input of q, k and v."""
        return self.round_attended(self.attend(*self.split_heads(self.qkv(qkv_input))))

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attention of `split_heads`, its columns in o_proj's order."""
        if self.config.kv_bits != 4:
            return self.join_heads(self.float.mix(*self.exact_heads(queries, keys, values)))
        windows, _, seqlen, head = queries.shape
        cached = self._cached(queries, keys, values)
        starts = torch.arange(windows + 1, dtype=torch.int32, device=queries.device) * seqlen
        attended = ops.kv_attention(*cached, starts, head**-0.5, head_dim_hi=self.head_dim_hi)
        return attended.unflatten(0, (windows, seqlen))

    @property
    def head_dim_hi(self) -> int:
        """Dims of a head in the high part of o_proj's input."""
        return self.format(O_PROJ).k_hi // self.shape.heads

    def join_heads(self, attended: torch.Tensor) -> torch.Tensor:
        """[..., heads, head_dim] side by side in the order of o_proj's columns."""
        return join_heads(attended, self.head_dim_hi)

    def round_attended(self, attended: torch.Tensor) -> MixedTensor:
        """The input of o_proj, from the heads side by side."""
        return ops.mixed_quantize(attended, *self.format(O_PROJ))

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [windows, heads, seqlen, head_dim], before RoPE."""
        queries, keys, values = (
            self.float.norm_head(self.float.split_heads(part), name)
            for name, part in zip(QKV, qkv.split(self.rows(QKV), dim=-1), strict=True)
        )
        return queries, keys, values

    def exact_heads(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys after RoPE and rotation, and values, of `split_heads`."""
        queries, keys = (apply_rope(t, self.rope) for t in (queries, keys))
        return *self.float.rotate(queries, keys), values

    def rounded_heads(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`exact_heads`, keys and values as the cache returns them."""
        if self.config.kv_bits != 4:
            return self.exact_heads(queries, keys, values)
        windows, _, seqlen, head = queries.shape
        rotated, pages, table, lengths = self._cached(queries, keys, values)
        keys, values = ops.kv_dequantize(pages, table, lengths, seqlen, head, torch.float32)
        queries = rotated.unflatten(0, (windows, seqlen))
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def _cached(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> _Cached:
        """Puts the keys and values of `split_heads` into pages."""
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        windows, seqlen, kv_heads, head = keys.shape
        device, size = keys.device, kv_pages.DEFAULT_PAGE_SIZE
        count = -(-seqlen // size)
        table = torch.arange(windows * count, device=device).view(windows, count)
        shape = kv_pages.cache_shape(windows * count, kv_heads, size, head)
        pages = torch.empty(shape, dtype=torch.uint8, device=device)
        slots = (table[:, :1] * size + torch.arange(seqlen, device=device)).flatten()
        cos, sin = (side[:seqlen].to(device).repeat(windows, 1) for side in self.rope)
        queries, keys, values = (t.flatten(0, 1) for t in (queries, keys, values))
        hi_bits = 8 if self.config.mixed else 4
        rotation = self.layer.key_rotation
        rotated = ops.kv_append(keys, values, cos, sin, rotation, pages, slots, hi_bits, queries)
        assert rotated is not None  # queries were given
        lengths = torch.full((windows,), seqlen, dtype=torch.int32, device=device)
        return _Cached(rotated, pages, table.int(), lengths)

    def after_attention(self, x: torch.Tensor, o_input: MixedTensor) -> torch.Tensor:
        """The residual stream between attention and MLP."""
        return x + self.linear(o_input, (O_PROJ,))

    def gate_up_input(self, hidden: torch.Tensor) -> MixedTensor:
        """The input of gate_proj and up_proj."""
        return self._normed(hidden, MLP_NORM, GATE_UP[0])

    def gate_up(self, gate_up_input: MixedTensor) -> torch.Tensor:
        """The outputs of gate_proj and up_proj, side by side."""
        return self.linear(gate_up_input, GATE_UP)

    def down_input(self, gate_up_input: MixedTensor) -> MixedTensor:
        """The input of down_proj, from that of gate and up."""
        return self.round_product(self.gate_up(gate_up_input))

    def round_product(self, gate_up: torch.Tensor) -> MixedTensor:
        """The input of down_proj, from the outputs of gate_proj and up_proj side by side."""
        return ops.silu_mul_hadamard_quantize(
            gate_up, self.layer.hadamard, *self.format(DOWN_PROJ), self.layer.hadamard_block
        )

    def output(self, hidden: torch.Tensor, down_input: MixedTensor) -> torch.Tensor:
        """The residual stream after the layer."""
        return hidden + self.linear(down_input, (DOWN_PROJ,))

    def format(self, name: str) -> RowFormat:
        """How the input of a linear is rounded."""
        columns, k_hi = self.shape.linear(name)[1], self.shape.k_hi(name, self.config)
        # A code a byte: the Hessians want them as numbers, and unpacking takes longer than reading.
        return RowFormat.of(self.config, columns, k_hi)._replace(packed=False)

    def _normed(self, x: torch.Tensor, norm: str, name: str) -> MixedTensor:
        gain, eps = self.layer.norms.get(norm), self.shape.norm_eps
        return ops.rms_norm_quantize(x, None, gain, eps, *self.format(name))[0]

    def linear(self, x: MixedTensor, names: tuple[str, ...]) -> torch.Tensor:
        """The outputs of the linears that read x, side by side."""
        weight = self.packed[names]
        return ops.mixed_gemm(
            *x, weight.data, weight.scale, weight.sums, self.bias(names), torch.float32
        )

    def rows(self, names: tuple[str, ...]) -> list[int]:
        """Output rows of each of these linears."""
        return [self.shape.linear(name)[0] for name in names]

    def bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """The biases of these linears side by side, if they have some."""
        biases = [self.layer.biases[name] for name in names if name in self.layer.biases]
        return torch.cat(biases) if biases else None
