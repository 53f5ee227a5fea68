"""ResQLinear: a linear layer with an INT4 and an INT8 part of its weight, on the real kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resq_kernels import ops
from resq_kernels.formats import MixedTensor, PackedWeight, QuantizedWeight, RowFormat
from resq_kernels.nn.straight import StraightRows, needs_gradient, product
from resq_kernels.nn.weight_view import WeightView
from resq_kernels.weights import quantize_weight


class ResQLinear(nn.Module):
    """y = x W^T + b with x quantized per token and W per output row, in two parts.

    Formula: docs/formats.md section 4; the sums over codes are exact, so y has the same bits
    whatever the batch size. The parameters are the canonical tensors of a checkpoint. `pack`
    puts the codes into the layout that the kernel reads; `state_dict`, `dequantize` and
    `unpack` recover the canonical codes, and loading a state dict packs them.

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
        row_format: `RowFormat` of the input.
        dtype: compute dtype; `.to(dtype)` and similar calls change it.

    Raises:
        ValueError: K_lo would be negative or odd.

    Source: arXiv 2412.14363, section 4.
    """

    # nn.Module registers these without declaring them.
    bias: nn.Parameter | None
    packed_weight: torch.Tensor | None
    weight_sum: torch.Tensor | None

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
        self.row_format = RowFormat(high_columns, lo_bits, None, symmetric, clip)
        self.dtype = dtype or torch.get_default_dtype()

        def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), False)

        self.weight_lo: nn.Parameter | None = parameter(out_features, k_lo // 2, dtype=torch.uint8)
        self.weight_hi: nn.Parameter | None = parameter(
            out_features, high_columns, dtype=torch.int8
        )
        self.weight_scale = parameter(out_features, 2, dtype=torch.float32)
        self.register_parameter("bias", None)
        if bias:
            self.bias = parameter(out_features, dtype=self.dtype)
        self.register_buffer("packed_weight", None, persistent=False)
        self.register_buffer("weight_sum", None, persistent=False)

    @staticmethod
    def from_linear(linear: nn.Linear, high_columns: int = 512) -> ResQLinear:
        """Quantizes one linear without calibration, to nearest, the last `high_columns` in INT8.

        Raises:
            ValueError: the weight is not finite, or the split is impossible.
        """
        weight = PackedWeight.pack(quantize_weight(linear.weight, high_columns))
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return ResQLinear.of(weight, bias, RowFormat(high_columns), linear.weight.dtype)

    @staticmethod
    def of(
        weight: PackedWeight | QuantizedWeight,
        bias: torch.Tensor | None,
        row_format: RowFormat,
        dtype: torch.dtype,
    ) -> ResQLinear:
        """A layer around these tensors, which are not copied.

        Args:
            weight: [N, K]; the layer is packed if the weight is.
            bias: [N] in the compute dtype, or None.
            row_format: how the input is quantized.
            dtype: compute dtype.
        """
        k = weight.k_lo + weight.k_hi
        layer = ResQLinear(k, weight.n, high_columns=weight.k_hi, dtype=dtype, device="meta")
        layer.row_format = row_format
        layer.hold(weight, bias)
        return layer

    @property
    def high_columns(self) -> int:
        """K_hi, the columns whose weights and activations are INT8."""
        return self.row_format.k_hi

    @property
    def weight(self) -> WeightView:
        """Shape [N, K], compute dtype and device of the weight, without values (`dequantize`)."""
        shape = (self.out_features, self.in_features)
        return WeightView(type(self).__name__, shape, self.dtype, self.weight_scale.device)

    @property
    def is_packed(self) -> bool:
        """Whether the codes are in the kernel's layout."""
        return self.packed_weight is not None

    def packed(self) -> PackedWeight:
        """The packed weight; it holds the layer's own tensors.

        Raises:
            RuntimeError: not packed, or packed for another kind of device.
        """
        # Directly: torch's lookup of attributes takes 0.3 us for each of them.
        data, sums = self._buffers["packed_weight"], self._buffers["weight_sum"]
        if data is None or sums is None:
            kind = type(self).__name__
            raise RuntimeError(f"{kind}: expected a packed weight: call pack() after loading")
        if data.device.type != self._packed_for:
            raise RuntimeError(
                f"{type(self).__name__}: packed_weight: expected the layout of {data.device.type}, "
                f"got that of {self._packed_for}: the tensor was moved on its own; move the module "
                "(to(), cpu(), cuda()), which packs it anew"
            )
        k_hi = self.row_format.k_hi
        return PackedWeight(data, self.weight_scale, sums, self.in_features - k_hi, k_hi)

    def pack(self) -> None:
        """Moves the codes into the layout that the kernel of their device reads."""
        if not self.is_packed:
            self._hold_codes(PackedWeight.pack(self.codes()))

    def unpack(self) -> None:
        """Moves the codes back into `weight_lo` and `weight_hi`."""
        if self.is_packed:
            self._hold_codes(self.codes())

    def hold(self, weight: PackedWeight | QuantizedWeight, bias: torch.Tensor | None) -> None:
        """Replaces the layer's tensors by these, which have its sizes."""
        self._hold_codes(weight)
        scale = weight.scale if isinstance(weight, PackedWeight) else weight.weight_scale
        self.weight_scale = nn.Parameter(scale.detach(), False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def _hold_codes(self, weight: PackedWeight | QuantizedWeight) -> None:
        if isinstance(weight, PackedWeight):
            self.packed_weight, self.weight_sum = weight.data, weight.sums
            self._packed_for = weight.data.device.type
            self.weight_lo = self.weight_hi = None
        else:
            self.weight_lo = nn.Parameter(weight.weight_lo, False)
            self.weight_hi = nn.Parameter(weight.weight_hi, False)
            self.packed_weight = self.weight_sum = None

    def codes(self) -> QuantizedWeight:
        """The canonical weight: uint8 [N, K_lo / 2], int8 [N, K_hi] and the scale."""
        if self.packed_weight is not None:
            codes = self.packed().codes()
            return codes._replace(weight_scale=codes.weight_scale.detach())
        assert self.weight_lo is not None and self.weight_hi is not None
        tensors = (self.weight_lo, self.weight_hi, self.weight_scale)
        return QuantizedWeight(*(tensor.detach() for tensor in tensors))

    def dequantize(self) -> torch.Tensor:
        """scale * code as float32 [N, K]: exactly the weight that the kernel computes with."""
        return self.codes().dequantize()

    def quantize_input(self, x: torch.Tensor) -> MixedTensor:
        """`mixed_quantize` with this layer's `row_format`."""
        return ops.mixed_quantize(x, *self.row_format)

    def forward(self, x: torch.Tensor | MixedTensor | StraightRows) -> torch.Tensor:
        """y [..., N] of x [..., K], in x's dtype, or the compute dtype for rounded rows; with the
        gradient by x, if x needs one.

        Raises:
            RuntimeError: not packed, or x has another K.
        """
        through: torch.Tensor | None = None
        if isinstance(x, MixedTensor):
            codes, dtype = x, self.dtype
        elif isinstance(x, StraightRows):
            (codes, through), dtype = x, self.dtype
        elif needs_gradient(x):
            codes, through, dtype = self.quantize_input(x.detach()), x, x.dtype
        else:
            codes, dtype = self.quantize_input(x), x.dtype
        data, scale, sums, _, _ = self.packed()
        y = ops.mixed_gemm(*codes, data, scale, sums, self.bias, dtype)
        return y if through is None else product(y, through, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, high_columns={self.high_columns}"
        )

    @property
    def _hf_hook(self) -> Any:
        """The hook that accelerate puts on a module, and moves its tensors by."""
        if "_hf_hook" not in vars(self):
            raise AttributeError(f"{type(self).__name__}: no hook of accelerate")
        return vars(self)["_hf_hook"]

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        """Refuses a hook that offloads: it moves parameters one by one and leaves packed codes.

        accelerate has moved the parameters before it gets here; they are brought back.
        """
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False):
                part.detach_hook(self)
                if "_hf_hook" not in vars(self):
                    vars(self).pop("_old_forward", None)
                raise ValueError(
                    f"{type(self).__name__}: expected a module that stays on its device, got "
                    "accelerate's offload hook: packed codes cannot be offloaded to CPU or disk "
                    "tensor by tensor; use devices of one kind, or to() for the whole model"
                )
        vars(self)["_hf_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        vars(self).pop("_hf_hook", None)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> ResQLinear:
        was_packed, here = self.is_packed, self.weight_scale.device
        moved = fn(torch.empty(0, dtype=self.dtype, device=here))
        if moved.device.type != here.type:
            self.unpack()  # the other device's kernel has its own layout
        apply: Callable[..., nn.Module] = super()._apply  # torch leaves it without types
        apply(keep_dtype(fn, self.weight_scale), recurse)
        self.dtype = moved.dtype
        if was_packed and not self.weight_scale.is_meta:
            self.pack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_packed:
            codes = self.codes()
            destination[prefix + "weight_lo"] = codes.weight_lo
            destination[prefix + "weight_hi"] = codes.weight_hi
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
        for name in QuantizedWeight._fields:
            expected, given = getattr(self, name), state_dict.get(prefix + name)
            if given is None and expected.numel() == 0:
                # Some savers take all empty tensors for one shared tensor and keep one, or none.
                state_dict[prefix + name] = expected
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
    """`fn`, an argument of `Module._apply`, without casting the tensors in `kept`."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if moved.dtype != tensor.dtype and any(tensor is other for other in kept):
            return tensor.to(moved.device)
        return moved

    return apply
