"""ResQLinear: a linear layer with an INT4 and an INT8 part of its weight, on the real kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resq_kernels import ops
from resq_kernels.formats import MixedTensor, unpack_int4, weight_sums
from resq_kernels.weights import quantize_weight

_CODES = ("weight_lo", "weight_hi")


class ResQLinear(nn.Module):
    """y = x W^T + b with x quantized per token and W per output row, in two parts.

    Formula: docs/formats.md section 4; the sums over codes are exact, so y has the same bits
    whatever the batch size. The parameters are the canonical tensors of a checkpoint. `pack`
    replaces the codes by the layout that the kernel reads; `state_dict`, `dequantize` and
    `unpack` give the canonical codes back, and loading a state packs it.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        high_columns: K_hi, the last columns, INT8; the K - K_hi columns before are INT4.
        lo_bits, symmetric, clip: how a plain tensor is quantized on its way in (`mixed_quantize`).
        dtype: compute dtype, of the bias and of the output for a `MixedTensor`.
        device: where the parameters are made.

    Attributes:
        weight_lo: uint8 [N, K_lo / 2], or None while packed.
        weight_hi: int8 [N, K_hi], or None while packed.
        weight_scale: float32 [N, 2]; no `.to(dtype)` casts it.
        bias: compute dtype [N], or None.
        version: counts what may have replaced a tensor: packing, unpacking, moving, casting.

    Raises:
        ValueError: K_lo would be negative or odd.

    Source: arXiv 2412.14363, section 4.
    """

    # Buffers, which nn.Module does not declare.
    packed_weight: torch.Tensor | None
    weight_sum: torch.Tensor | None
    compute: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        high_columns: int,
        lo_bits: int = 4,
        symmetric: bool = False,
        clip: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        k_lo = in_features - high_columns
        if high_columns < 0 or k_lo < 0 or k_lo % 2:
            raise ValueError(
                "ResQLinear: high_columns: expected a number that leaves an even number of the "
                f"{in_features} columns for INT4, got {high_columns}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.high_columns = high_columns
        self.lo_bits, self.symmetric, self.clip = lo_bits, symmetric, clip

        def parameter(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), False)

        self.weight_lo: nn.Parameter | None = parameter(out_features, k_lo // 2, dtype=torch.uint8)
        self.weight_hi: nn.Parameter | None = parameter(
            out_features, high_columns, dtype=torch.int8
        )
        self.weight_scale = parameter(out_features, 2, dtype=torch.float32)
        self.bias = parameter(out_features, dtype=dtype) if bias else None
        self.register_buffer("packed_weight", None, persistent=False)
        self.register_buffer("weight_sum", None, persistent=False)
        # Without elements: what `.to(dtype)` and its relatives cast, so that the module knows.
        compute = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("compute", compute, persistent=False)
        self.version = 0

    @classmethod
    def from_linear(cls, linear: nn.Linear, high_columns: int = 512) -> ResQLinear:
        """One linear without calibration: the last `high_columns` columns INT8, rounded to nearest.

        Raises:
            ValueError: the weight is not finite, or the split is impossible.
        """
        codes_lo, codes_hi, scale = quantize_weight(linear.weight, high_columns)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            high_columns=high_columns,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        layer.weight_lo = nn.Parameter(codes_lo, False)
        layer.weight_hi = nn.Parameter(codes_hi, False)
        layer.weight_scale.data = scale
        if layer.bias is not None:
            layer.bias.data = linear.bias.detach().clone()
        layer.pack()
        return layer

    @property
    def is_packed(self) -> bool:
        """Whether the codes are in the kernel's layout."""
        return self.packed_weight is not None

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: what the product of a `MixedTensor` is returned in."""
        return self.compute.dtype

    def pack(self) -> None:
        """Moves the codes into the layout that the kernel of their device reads."""
        if self.is_packed:
            return
        weight_lo, weight_hi = self.codes()
        self.packed_weight = ops.pack_weight(weight_lo, weight_hi)
        self.weight_sum = weight_sums(weight_lo, weight_hi)
        self.weight_lo = self.weight_hi = None
        self.version += 1

    def unpack(self) -> None:
        """Moves the codes back into `weight_lo` and `weight_hi`."""
        if not self.is_packed:
            return
        for name, codes in zip(_CODES, self.codes(), strict=True):
            setattr(self, name, nn.Parameter(codes, False))
        self.packed_weight = self.weight_sum = None
        self.version += 1

    def weight_tensors(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What `multiply` takes: packed weight, scale [N, 2], sums [N, 2], bias [N] or None.

        Raises:
            RuntimeError: not packed.
        """
        if self.packed_weight is None or self.weight_sum is None:
            kind = type(self).__name__
            raise RuntimeError(f"{kind}: expected a packed weight: call pack() after loading")
        return self.packed_weight, self.weight_scale, self.weight_sum, self.bias

    def adopt(
        self,
        packed_weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_sum: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Takes equal tensors in place of its own: slices of a merged weight (nn/merged.py)."""
        self.packed_weight, self.weight_sum = packed_weight, weight_sum
        self.weight_scale.data = weight_scale
        if bias is not None:
            assert self.bias is not None  # only linears that are alike are merged
            self.bias.data = bias

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The canonical codes: uint8 [N, K_lo / 2] and int8 [N, K_hi]."""
        if self.packed_weight is None:
            assert self.weight_lo is not None and self.weight_hi is not None
            return self.weight_lo.detach(), self.weight_hi.detach()
        k_lo = self.in_features - self.high_columns
        return ops.unpack_weight(self.packed_weight, self.out_features, k_lo, self.high_columns)

    def dequantize(self) -> torch.Tensor:
        """scale * code as float32 [N, K]: exactly the weight that the kernel computes with."""
        codes_lo, codes_hi = self.codes()
        scale_lo, scale_hi = self.weight_scale.detach().split(1, dim=1)
        return torch.cat([scale_lo * unpack_int4(codes_lo), scale_hi * codes_hi], dim=1)

    def quantize_input(self, x: torch.Tensor) -> MixedTensor:
        """`mixed_quantize` with this layer's split and options."""
        return ops.mixed_quantize(
            x, self.high_columns, self.lo_bits, symmetric=self.symmetric, clip=self.clip
        )

    def forward(self, x: torch.Tensor | MixedTensor) -> torch.Tensor:
        """y [..., N] of x [..., K], in x's dtype, or the compute dtype for a `MixedTensor`.

        Raises:
            RuntimeError: not packed, or x has another K.
        """
        return self.multiply(x, *self.weight_tensors())

    def multiply(
        self,
        x: torch.Tensor | MixedTensor,
        packed_weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_sum: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`mixed_gemm` of x, as this layer reads it, and `weight_tensors` with any number of rows.

        A tensor is quantized first and returned in its own dtype, a `MixedTensor` in the compute
        dtype.
        """
        if isinstance(x, MixedTensor):
            codes, out_dtype = x, self.dtype
        else:
            codes, out_dtype = self.quantize_input(x), x.dtype
        return ops.mixed_gemm(*codes, packed_weight, weight_scale, weight_sum, bias, out_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, high_columns={self.high_columns}"
        )

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> ResQLinear:
        was_packed = self.is_packed
        if self.packed_weight is not None:
            here = self.packed_weight.device
            if fn(torch.empty(0, device=here)).device.type != here.type:
                self.unpack()  # the other device's kernel has its own layout
        apply: Callable[..., nn.Module] = super()._apply  # torch leaves it without types
        apply(keep_dtype(fn, self.weight_scale), recurse)
        self.version += 1
        if was_packed and not self.weight_scale.is_meta:
            self.pack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_packed:
            for name, codes in zip(_CODES, self.codes(), strict=True):
                destination[prefix + name] = codes
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unpack()
        for name in (*_CODES, "weight_scale"):
            expected, given = getattr(self, name), state_dict.get(prefix + name)
            if given is not None and given.dtype != expected.dtype:
                error_msgs.append(
                    f"ResQLinear: {prefix}{name}: expected {expected.dtype}, got {given.dtype}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not any(parameter.is_meta for parameter in self.parameters(recurse=False)):
            self.pack()


def keep_dtype(
    fn: Callable[[torch.Tensor], torch.Tensor], *kept: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` as `Module._apply` gets it, except that it does not cast the tensors in `kept`."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if moved.dtype != tensor.dtype and any(tensor is other for other in kept):
            return tensor.to(moved.device)
        return moved

    return apply
