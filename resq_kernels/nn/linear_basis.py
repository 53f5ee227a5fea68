"""From the float model's linears to the quantized model's, and back: the basis of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from resq_kernels import hadamard
from resq_kernels.architecture import (
    DOWN_PROJ,
    GATE_PROJ,
    GATE_UP,
    K_PROJ,
    LINEARS,
    NORMS,
    O_PROJ,
    Q_PROJ,
    V_PROJ,
    ModelShape,
)
from resq_kernels.formats import join_heads
from resq_kernels.nn.hidden_basis import HiddenBasis
from resq_kernels.nn.linear import keep_dtype

Turn = Callable[[torch.Tensor], torch.Tensor]


class LinearBases(nn.Module):
    """What the bases of all linears take besides U_A. The kernels never read it.

    Args:
        shape: of the model.
        device: where the parameters are made.

    Attributes:
        norm_gains: float32 [layers, 2, hidden], of the norms before q, k, v and before gate, up.
        key_factors: float32 [layers, kv_heads, head_dim / 2], of the rotary pairs of keys.
        values: U_B, float32 [layers, kv_heads, head_dim, head_dim].
        intermediate_factors: float32 [layers, intermediate], in the float model's order.
        intermediate_order: float32 [layers, intermediate], the float model's channels in the order
            of down_proj's columns; not integers, on which `requires_grad_` raises.
    """

    def __init__(self, shape: ModelShape, device: torch.device | str | None = None) -> None:
        super().__init__()

        def ones(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape.layers, *sizes, device=device).float(), False)

        dim, width = shape.head_dim, shape.intermediate
        self.norm_gains = ones(len(NORMS), shape.hidden)
        self.key_factors = ones(shape.kv_heads, dim // 2)
        eye = torch.eye(dim, dtype=torch.float32, device=device)
        self.values = nn.Parameter(eye.repeat(shape.layers, shape.kv_heads, 1, 1), False)
        self.intermediate_factors = ones(width)
        order = torch.arange(width, dtype=torch.float32, device=device).repeat(shape.layers, 1)
        self.intermediate_order = nn.Parameter(order, False)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> LinearBases:
        apply: Callable[..., nn.Module] = super()._apply  # torch leaves it without types
        apply(keep_dtype(fn, *self.parameters()), recurse)
        return self


@dataclass(frozen=True)
class LinearBasis:
    """The two sides of one linear: y = W x of the float model is R W C of x in its own basis.

    Formula, with U_A, U_B (of the kv head), H, the norm's gain g, key factors k (of the pair) and
    intermediate factors f: W C is W diag(g) U_A for q, k, v, gate, up; W U_B^-T per head, then
    columns low | high, for o; W diag(1/f), then columns low | high, the low ones times H^T, for
    down. R W is diag(1/k) W for q; diag(k) W for k; U_B^T W for v; W for gate and diag(f) W for up,
    then rows in the order of down's columns; U_A^T W for o and down. An update B A of W is
    therefore (R B) (A C). With method "quik" g stays in the norms, and there is no H.

    Attributes:
        name: one of `architecture.LINEARS`.
        layer: index of its decoder layer.
        hidden: U_A, and the rest in `linears`.
        heads: query heads.
        k_hi: INT8 columns of the linear.
        rotated: whether the linears hold the gains, and a Hadamard transform is before down_proj.
        block: of that transform, as in `hadamard.transform_low`.

    Source: `ptq.fuse`; tests/ptq/test_linear_basis.py keeps the two together.
    """

    name: str
    layer: int
    hidden: HiddenBasis
    heads: int
    k_hi: int
    rotated: bool
    block: int

    def check(self) -> LinearBases:
        """What the basis takes besides U_A.

        Raises:
            ValueError: the checkpoint does not hold it.
        """
        if self.hidden.linears is None:
            raise ValueError(
                "linear_basis: expected the bases of the linears, got a checkpoint of a format "
                "before 6, which holds none: adapters of the float model would mean nothing in "
                "this one; quantize the model again"
            )
        return self.hidden.linears

    def columns(self, w: torch.Tensor) -> torch.Tensor:
        """W C, of W [..., K] in the float model's basis; in w's dtype."""
        if self.name == O_PROJ:
            inverse = torch.linalg.inv(self._of("values", w))
            heads = w.unflatten(-1, (len(inverse), -1, inverse.shape[-1]))
            turned = torch.einsum("...kgd,ked->...kge", heads, inverse).flatten(-3, -2)
            return join_heads(turned, self.k_hi // self.heads)
        if self.name == DOWN_PROJ:
            scaled = (w / self._of("intermediate_factors", w))[..., self._order(w)]
            return self._transform(scaled)
        return (w * self._gain(w)) @ self._rotation(w)

    def float_columns(self, w: torch.Tensor) -> torch.Tensor:
        """W of W C; a column that a gain of 0 has erased is 0."""
        if self.name == O_PROJ:
            low, high = w.split([w.shape[-1] - self.k_hi, self.k_hi], dim=-1)
            parts = [side.unflatten(-1, (self.heads, -1)) for side in (low, high)]
            values = self._of("values", w)
            heads = torch.cat(parts, dim=-1).unflatten(-2, (len(values), -1))
            return torch.einsum("...kge,kde->...kgd", heads, values).flatten(-3)
        if self.name == DOWN_PROJ:
            natural = self._order(w).argsort()
            # It is orthogonal.
            scaled = _transposed(self._transform, w, w.shape)[..., natural]
            return scaled * self._of("intermediate_factors", w)
        gain = self._gain(w)
        return torch.where(gain == 0, 0, (w @ self._rotation(w).mT) / gain)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        """R W, of W [N, ...]; in w's dtype."""
        return self._turn_rows(w, to_float=False)

    def float_rows(self, w: torch.Tensor) -> torch.Tensor:
        """W of R W."""
        return self._turn_rows(w, to_float=True)

    def _turn_rows(self, w: torch.Tensor, to_float: bool) -> torch.Tensor:
        flat = w.flatten(1) if w.dim() > 1 else w[:, None]
        if self.name in (Q_PROJ, K_PROJ):
            factors = self._of("key_factors", w).repeat(1, 2)
            group = len(w) // factors.numel()
            factors = factors.repeat_interleave(group, dim=0).view(-1, 1)
            turned = flat * factors if to_float == (self.name == Q_PROJ) else flat / factors
        elif self.name == V_PROJ:
            values = self._of("values", w)
            turn = torch.linalg.inv(values).mT if to_float else values.mT
            turned = (turn @ flat.unflatten(0, values.shape[:2])).flatten(0, 1)
        elif self.name in GATE_UP:
            order, factors = self._order(w), self._of("intermediate_factors", w)[:, None]
            if self.name == GATE_PROJ:
                factors = torch.ones_like(factors)
            turned = flat[order.argsort()] / factors if to_float else (flat * factors)[order]
        else:
            rotation = self._rotation(w)
            turned = (rotation if to_float else rotation.mT) @ flat
        return turned.view(w.shape)

    def _of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """This layer's part of a tensor of `LinearBases`, in dtype and on device of `like`."""
        tensor: torch.Tensor = getattr(self.check(), name)[self.layer]
        return tensor.to(like)

    def _gain(self, like: torch.Tensor) -> torch.Tensor:
        gain = self._of("norm_gains", like)[int(self.name in GATE_UP)]
        return gain if self.rotated else torch.ones_like(gain)

    def _rotation(self, like: torch.Tensor) -> torch.Tensor:
        assert self.hidden.rotation is not None
        return self.hidden.rotation.to(like)

    def _transform(self, w: torch.Tensor) -> torch.Tensor:
        return hadamard.transform_low(w, self.k_hi, self.block) if self.rotated else w

    def _order(self, like: torch.Tensor) -> torch.Tensor:
        return self.check().intermediate_order[self.layer].to(like.device, torch.int64)


def bases_of(decoder: Any) -> Iterator[tuple[str, LinearBasis | None]]:
    """Name, in the decoder, and basis of every linear of a decoder that `nn.convert` has converted;
    None where it is the float model's."""
    hidden: HiddenBasis | None = decoder.hidden_basis
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        k_hi = {
            O_PROJ: attention.heads * attention.head_dim_hi,
            DOWN_PROJ: mlp.down_proj.row_format.k_hi,
        }
        for name in LINEARS:
            basis = None
            if hidden is not None:
                own = (attention.heads, k_hi.get(name, 0), mlp.hadamard, mlp.hadamard_block)
                basis = LinearBasis(name, index, hidden, *own)
            yield f"layers.{index}.{name}", basis


def turned(turn: Turn, w: torch.Tensor) -> torch.Tensor:
    """turn(w) of a linear map, with its gradient, for which nothing is kept: autograd would keep
    U_A in float32 for every linear."""
    return cast(torch.Tensor, _Turned.apply(turn, w))  # type: ignore[no-untyped-call]


class _Turned(torch.autograd.Function):
    """`turned`."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, w: torch.Tensor) -> torch.Tensor:
        ctx.turn, ctx.shape = turn, w.shape
        return turn(w)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _transposed(ctx.turn, gradients[0], ctx.shape)


def _transposed(turn: Turn, w: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The transpose of a linear map from `shape`, applied to w: autograd knows it."""
    x = w.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        (out,) = torch.autograd.grad(turn(x), x, w)
    return out
