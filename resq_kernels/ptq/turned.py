"""The float decoder layer with inputs, keys and values rounded in bases that can be turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.nn import functional

from resq_kernels import hadamard
from resq_kernels.architecture import DOWN_PROJ, GATE_UP, O_PROJ, QKV
from resq_kernels.config import ResQConfig
from resq_kernels.formats import RowFormat
from resq_kernels.ptq.decoder import DecoderLayer, Rope
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.straight import round_cache, round_in_basis, round_rows


@dataclasses.dataclass
class Turns:
    """The bases of a model while they are learned, and the gradients of turns away from them.

    Attributes:
        hidden: U_A, float64 [hidden, hidden].
        values, values_inverse: U_B and its inverse, float64 [layers, kv_heads, head_dim, head_dim].
        hidden_turn: zeros [hidden, hidden], whose float32 gradient is that of U_A (I + D) by D.
        value_turns: zeros, one [kv_heads, head_dim, head_dim] a layer: of U_B (I + D) and
            (I + D)^T U_B^-1.
        matrix: U_A in the dtype in which the layers multiply with it.
    """

    hidden: torch.Tensor
    values: torch.Tensor
    values_inverse: torch.Tensor
    hidden_turn: torch.Tensor
    value_turns: list[torch.Tensor]
    matrix: torch.Tensor

    @classmethod
    def begin(cls, rotation: Rotation, products: torch.dtype, device: str) -> Turns:
        """Those of a rotation."""
        matrices = rotation.hidden, rotation.values, rotation.values_inverse
        hidden, values, inverse = (matrix.to(device) for matrix in matrices)
        zeros = [torch.zeros_like(t, dtype=torch.float32) for t in (hidden, *values)]
        first, *others = (zero.requires_grad_() for zero in zeros)
        return cls(hidden, values, inverse, first, others, hidden.to(products))

    def multiply(self, hidden: torch.Tensor, values: torch.Tensor) -> None:
        """Turns the bases by orthogonal matrices from the right, and forgets the gradients."""
        self.hidden = self.hidden @ hidden
        self.matrix = self.hidden.to(self.matrix.dtype)
        self.values = self.values @ values
        self.values_inverse = values.mT @ self.values_inverse
        for turn in (self.hidden_turn, *self.value_turns):
            turn.grad = None

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `hidden_turn`, [hidden, hidden], and of `value_turns`, [layers, kv_heads, head_dim,
        head_dim], float64."""
        assert self.hidden_turn.grad is not None
        values = [turn.grad for turn in self.value_turns if turn.grad is not None]
        return self.hidden_turn.grad.double(), torch.stack(values).double()

    def matrices(self) -> dict[str, torch.Tensor]:
        """The bases, by the names of `Rotation`."""
        names = ("hidden", "values", "values_inverse")
        return {name: getattr(self, name).cpu().contiguous() for name in names}

    def restore(self, matrices: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `matrices` gave."""
        for name, matrix in matrices.items():
            setattr(self, name, matrix.to(self.hidden.device))
        self.matrix = self.hidden.to(self.matrix.dtype)


class TurnedLayer(DecoderLayer):
    """`DecoderLayer` of the source whose linears get what those of the rotated model would get.

    Formula: an input x of q, k, v or of gate, up becomes (x + e U_A^T), e the error of rounding
    x U_A (`round_in_basis`); values v U_B, and keys in their own basis, go through the cache's
    rounding; o_proj's input is rounded in U_B and turned back by U_B^-1; down_proj's is rounded
    after its Hadamard transform. Without any rounding the layer is the source's. So no weight is
    rotated again when U_A and U_B turn, and none is rounded.

    Args:
        model: the source.
        index: which layer.
        rotation: keys, factors and the order of down_proj's columns; U_A and U_B are those of
            `turns`.
        turns: the bases that are learned.
        rope: tables of `rope_tables`.
        config: how inputs, keys and values are rounded.
        device: where the layer is computed.
    """

    def __init__(
        self,
        model: SourceModel,
        index: int,
        rotation: Rotation,
        turns: Turns,
        rope: Rope,
        config: ResQConfig,
        device: str,
    ) -> None:
        layer = fuse_layer(model, index, _without_bases(rotation), config, device)
        assert layer.o_order is not None
        self._natural = layer.o_order.argsort()
        layer.weights[O_PROJ] = layer.weights[O_PROJ][:, self._natural]
        super().__init__(model.shape, layer.to(device, turns.matrix.dtype), rope)
        self._index, self._turns, self._config = index, turns, config

    def qkv_input(self, x: torch.Tensor) -> torch.Tensor:
        return self._in_basis(super().qkv_input(x), QKV[0])

    def gate_up_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._in_basis(super().gate_up_input(hidden), GATE_UP[0])

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        shape, layer = self.shape, self.layer
        matrix = self._turns.values[self._index].float()
        inverse = self._turns.values_inverse[self._index].float()
        turn = torch.eye(shape.head_dim, device=matrix.device)
        turn = turn + self._turns.value_turns[self._index]
        queries, keys = self.rotate(queries, keys)
        values = values @ matrix @ turn
        if self._config.kv_bits == 4:
            hi_bits = 8 if self._config.mixed else 4
            keys, values = (round_cache(x, hi_bits) for x in (keys, values))
        attended = self.mix(queries, keys, values).flatten(2)[..., layer.o_order]
        rounded = round_rows(attended, self._format(O_PROJ))[..., self._natural]
        back = (turn.mT @ inverse).repeat_interleave(shape.heads // shape.kv_heads, dim=0)
        heads = rounded.unflatten(-1, (shape.heads, shape.head_dim))
        return torch.einsum("wshd,hde->wshe", heads, back).flatten(2)

    def mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # In bfloat16 attention takes 0.4 of float32's time, forward and backward (AVX512-BF16).
        heads = (x.to(self._turns.matrix.dtype) for x in (queries, keys, values))
        return super().mix(*heads).float()

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product, layer = functional.silu(gate) * up, self.layer
        transformed = hadamard.transform_low(product, layer.down_high, layer.hadamard_block)
        return round_rows(transformed, self._format(DOWN_PROJ))

    def _in_basis(self, x: torch.Tensor, name: str) -> torch.Tensor:
        turns = self._turns
        return round_in_basis(x, turns.hidden_turn, turns.matrix, self._format(name))

    def _format(self, name: str) -> RowFormat:
        shape, config = self.shape, self._config
        columns, k_hi = shape.linear(name)[1], shape.k_hi(name, config)
        return RowFormat.of(config, columns, k_hi)._replace(packed=False)


def _without_bases(rotation: Rotation) -> Rotation:
    """The rotation with U_A and U_B the identity."""
    hidden = torch.eye(len(rotation.hidden), dtype=torch.float64)
    values = torch.eye(rotation.values.shape[-1], dtype=torch.float64)
    values = values.expand_as(rotation.values)
    return dataclasses.replace(rotation, hidden=hidden, values=values, values_inverse=values)
