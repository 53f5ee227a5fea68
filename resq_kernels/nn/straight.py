"""The backward of the quantized modules: straight through every rounding.

Operators have no backward. Where a gradient is asked for, a module computes what it always does, by
the same operators and to the same bits, and gives the result the gradient of the same function
without rounding, at the rounded weights (arXiv 1308.3432). Weights, norms and rotations are frozen:
an operator that gets one of them with `requires_grad` refuses it by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from resq_kernels import hadamard, ops
from resq_kernels.formats import MixedTensor, join_heads
from resq_kernels.nn.batch import AttentionMetadata, apply_rope

if TYPE_CHECKING:
    from resq_kernels.nn.attention import ResQAttention
    from resq_kernels.nn.linear import ResQLinear
    from resq_kernels.nn.paged import PagedKeysValues

# Rows of a weight that are floats at a time in a backward pass: 64 MB at 4096 columns.
BLOCK_ROWS = 4096


class StraightRows(NamedTuple):
    """Rounded rows with a gradient.

    Attributes:
        codes: what the operators read.
        values: `codes.dequantize()`, float32 [..., K], through which the gradient goes.
    """

    codes: MixedTensor
    values: torch.Tensor


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def straight(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `exact`."""
    return cast(torch.Tensor, _Straight.apply(rounded, exact))  # type: ignore[no-untyped-call]


def straight_rows(codes: MixedTensor, exact: torch.Tensor) -> StraightRows:
    """What `exact` [..., K] was rounded to, with its gradient."""
    return StraightRows(codes, straight(codes.dequantize(), exact))


def product(y: torch.Tensor, x: torch.Tensor, linear: ResQLinear) -> torch.Tensor:
    """y = x W^T [..., N] as the operator computed it, with the gradient by x [..., K].

    Formula: dx = dy W in the dtype of dy; on a CPU in float32 (a product of bfloat16 took 34 times
    as long without instructions for it). W is `linear.dequantize()` by `BLOCK_ROWS` rows, whose sum
    is float32. Nothing but the packed weight is kept for the backward pass.
    """
    return cast(torch.Tensor, _Product.apply(y, x, linear))  # type: ignore[no-untyped-call]


def swiglu(gate_up: torch.Tensor, transforms: bool, k_hi: int, block: int) -> torch.Tensor:
    """float32 [..., I]: what `ops.silu_mul_hadamard_quantize` rounds, of [gate | up] [..., 2 I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    return hadamard.transform_low(hidden, k_hi, block) if transforms else hidden


def attention(
    out: torch.Tensor,
    rotated: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    module: ResQAttention,
    paged: PagedKeysValues,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """`out`, with the gradient of attention over the keys and values that the pages hold.

    Args:
        out: [B, L, n_q D], attention by the operators.
        rotated: [B L, n_q, D], the queries that it read.
        exact: q, k, v [B, L, n, D] as they were projected, with gradients.
        module, paged, metadata: that `out` was computed with; the pages hold this pass alone.
    """
    batch, new = metadata.batch, metadata.new
    rope = [side.view(batch, new, -1).float() for side in (metadata.cos, metadata.sin)]  # type: ignore[union-attr]
    q, k, v = (x.float() for x in exact)
    q, k = (apply_rope(x, *rope) for x in (q, k))
    if module.key_rotation is not None:
        q, k = (x @ module.key_rotation[0].float() for x in (q, k))
    length = max(length for _, length in metadata.lengths)
    table = metadata.block_table(paged.pages_per_sequence)
    lens, dim = metadata.seq_lens, module.head_dim
    k_stored, v_stored = ops.kv_dequantize(paged.held(), table, lens, length, dim, torch.float32)
    positions = metadata.positions.view(batch, new)
    mask = None
    if metadata.rows is not None:
        tokens = positions >= 0
        rows = torch.arange(batch, device=positions.device)[:, None]
        places = positions.clamp_min(0)
        k_stored, v_stored = k_stored[rows, places], v_stored[rows, places]
        causal = torch.ones(new, new, dtype=torch.bool, device=positions.device).tril()
        eye = torch.eye(new, dtype=torch.bool, device=positions.device)  # a softmax of something
        mask = (causal & tokens[:, None, :] | eye)[:, None]
    heads = F.scaled_dot_product_attention(
        straight(rotated.view_as(q), q).transpose(1, 2),
        straight(k_stored, k).transpose(1, 2),
        straight(v_stored, v).transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=module.scaling,
        enable_gqa=True,
    )
    joined = join_heads(heads.transpose(1, 2), module.head_dim_hi)
    if mask is not None:
        joined = joined.masked_fill(positions[..., None] < 0, 0)
    return straight(out, joined)


class _Straight(torch.autograd.Function):
    """`straight`."""

    @staticmethod
    def forward(ctx: Any, rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradients[0]


class _Product(torch.autograd.Function):
    """`product`."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, linear: ResQLinear) -> torch.Tensor:
        ctx.linear = linear
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        weight, gradient = ctx.linear.packed(), gradients[0]
        if gradient.device.type == "cpu":
            gradient = gradient.float()
        parts = gradient.split(BLOCK_ROWS, dim=-1)
        weights = weight.split([part.shape[-1] for part in parts])
        by_x = torch.zeros(*gradient.shape[:-1], weight.k_lo + weight.k_hi, device=gradient.device)
        for part, rows in zip(parts, weights, strict=True):
            by_x += part @ rows.codes().dequantize().to(part.dtype)
        return None, by_x, None
