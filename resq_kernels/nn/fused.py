"""FusedLinear: the linears that read the same rows (q, k, v; gate, up) as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from resq_kernels.formats import MixedTensor, PackedWeight, QuantizedWeight
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.straight import StraightRows


class FusedLinear(ResQLinear):
    """[y_1 | y_2 | ...] of linears that read the same rows, by one `mixed_gemm`; the same bits.

    A state dict has the names of the parts: "q_proj.weight_lo". Scale and bias are buffers that it
    does not contain, because code that moves parameters one by one looks each of them up in the
    state dict.

    Args:
        name: the owner's attribute that holds it; not part of the names in a state dict.
        parts: the linears by name, in the order of the result. They have the same K, K_hi, row
            format, dtype and device, and all or none have a bias. Their tensors are copied. It is
            packed if all of them are; call `pack` on it otherwise.
        weight: the rows of all parts, if the parts have no weights.

    Attributes:
        rows: name of a part -> its N.

    Raises:
        ValueError: a part is not a plain `ResQLinear` (adapter, hook), or the parts differ.
        RuntimeError: a linear is packed for another kind of device.
    """

    def __init__(
        self, name: str, parts: Mapping[str, ResQLinear], weight: PackedWeight | None = None
    ) -> None:
        _check_parts(parts)
        linears = list(parts.values())
        first = linears[0]
        super().__init__(
            first.in_features,
            sum(linear.out_features for linear in linears),
            high_columns=first.high_columns,
            dtype=first.dtype,
            device="meta",
        )
        self.name, self.row_format = name, first.row_format
        self.rows = {part: linear.out_features for part, linear in parts.items()}
        self._take(_joined(linears) if weight is None else weight, linears)

    def hold(self, weight: PackedWeight | QuantizedWeight, bias: torch.Tensor | None) -> None:
        """Takes these tensors in place of its own, scale and bias as buffers."""
        super().hold(weight, bias)
        for name in ("weight_scale", "bias"):
            if (parameter := self._parameters.get(name)) is not None:
                del self._parameters[name]
                self.register_buffer(name, parameter.data, persistent=False)

    def _take(self, weight: PackedWeight | QuantizedWeight, linears: list[ResQLinear]) -> None:
        """Holds a weight with the rows of all parts, and their biases."""
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self.hold(weight, torch.cat(biases) if biases else None)

    def split(self) -> dict[str, ResQLinear]:
        """The parts as separate linears; their tensors are slices where row blocks allow it."""
        rows = list(self.rows.values())
        weights: list[Any] = (self.packed() if self.is_packed else self.codes()).split(rows)
        biases = [None] * len(rows) if self.bias is None else self.bias.split(rows)
        return {
            part: ResQLinear.of(weight, bias, self.row_format, self.dtype)
            for part, weight, bias in zip(self.rows, weights, biases, strict=True)
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows}"

    def _outer(self, prefix: str) -> str:
        return prefix.removesuffix(f"{self.name}.")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        own: dict[str, Any] = {}
        for part, linear in self.split().items():
            linear._save_to_state_dict(own, f"{self._outer(prefix)}{part}.", keep_vars)
        # Clones, because some savers refuse tensors that share a storage.
        destination |= {key: tensor.clone() for key, tensor in own.items()}

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
        outer, own = self._outer(prefix), {}
        for key, tensor in state_dict.items():
            inner = key.removeprefix(prefix)
            if key.startswith(prefix) and inner.partition(".")[0] in self.rows:
                own[outer + inner] = tensor
            elif key.startswith(prefix) and strict:
                unexpected_keys.append(key)
        lists = (missing_keys, unexpected_keys, error_msgs)
        parts = self.split()
        for part, linear in parts.items():
            linear._load_from_state_dict(own, f"{outer}{part}.", local_metadata, strict, *lists)
        linears = list(parts.values())
        devices = {tensor.device for linear in linears for tensor in linear.parameters()}
        if len(devices) > 1:  # some loaded by assignment, the others still on meta
            error_msgs.append(
                f"FusedLinear: {outer}{self.name}: expected all parts on one device, got "
                f"{' and '.join(sorted(map(str, devices)))}; load every part, or unfuse() first"
            )
        else:
            self._take(_joined(linears), linears)


def _joined(linears: list[ResQLinear]) -> PackedWeight | QuantizedWeight:
    """The rows of all linears, packed if all of them are."""
    if all(linear.is_packed for linear in linears):
        return PackedWeight.cat([linear.packed() for linear in linears])
    return QuantizedWeight.cat([linear.codes() for linear in linears])


class FusesLinears(nn.Module):
    """A module that can replace its linears `PARTS` by one `FusedLinear` named `FUSED`.

    Before `fuse`, and after `unfuse`, the parts are ordinary modules that are called one by one.
    Checkpoints are loaded in this form, and a part can get a hook or an adapter. `state_dict` and
    `load_state_dict` use the names of the parts either way.
    """

    FUSED: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.register_module(self.FUSED, None)

    @property
    def fused(self) -> FusedLinear | None:
        """The fused linear, or None while the parts are apart."""
        found: Any = self._modules.get(self.FUSED)
        return found if isinstance(found, FusedLinear) else None

    def fuse(self, weight: PackedWeight | None = None) -> None:
        """Replaces the parts by a `FusedLinear`, which is packed if all of them are.

        Args:
            weight: the rows of all parts, if the parts have no weights; it is not copied.

        Raises:
            ValueError: a part has a hook or is not a `ResQLinear`, or the parts differ in more than
                their rows.
            RuntimeError: a part is packed for another kind of device.
        """
        if self.fused is None:
            # These tensors must outlive the caller's inference mode.
            with torch.inference_mode(False):
                parts = {part: getattr(self, part) for part in self.PARTS}
                fused = FusedLinear(self.FUSED, parts, weight)
            for part in self.PARTS:
                delattr(self, part)
            setattr(self, self.FUSED, fused)

    def unfuse(self) -> None:
        """Replaces the `FusedLinear` by its parts."""
        if (fused := self.fused) is not None:
            with torch.inference_mode(False):
                parts = fused.split()
            setattr(self, self.FUSED, None)
            for part, linear in parts.items():
                setattr(self, part, linear)

    def project(self, x: torch.Tensor | MixedTensor | StraightRows) -> torch.Tensor:
        """The outputs of all parts for x [..., K], concatenated: [..., N_1 + N_2 + ...]."""
        if (fused := self.fused) is not None:
            joined: torch.Tensor = fused(x)
            return joined
        return torch.cat([getattr(self, part)(x) for part in self.PARTS], dim=-1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self._refuse_fused(name)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_fused(name)
        super().__setattr__(name, value)

    def _refuse_fused(self, name: str) -> None:
        """Raises for a part that is fused: a module in its place would never be called."""
        if name in type(self).PARTS and self.__dict__["_modules"].get(self.FUSED) is not None:
            raise AttributeError(
                f"{type(self).__name__}: {name}: expected a module of its own, got a part of "
                f"{self.FUSED}; call unfuse() first"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if self.fused is not None:
            # torch passes a child the keys that start with its own name.
            parts = tuple(f"{prefix}{part}." for part in self.PARTS)
            for key in [key for key in state_dict if key.startswith(parts)]:
                inner = key.removeprefix(prefix)
                state_dict[f"{prefix}{self.FUSED}.{inner}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _check_parts(parts: Mapping[str, ResQLinear]) -> None:
    """Checks that one product can replace those of all parts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    first, expected = next((name, _kind(linear)) for name, linear in parts.items())
    for name, linear in parts.items():
        if type(linear) is not ResQLinear or "forward" in vars(linear):
            kind = type(linear).__name__
            if type(linear) is ResQLinear:
                kind += " with another forward"
            raise ValueError(f"FusedLinear: {name}: expected an unmodified ResQLinear, got {kind}")
        if any(getattr(linear, kind) for kind in hooks):
            raise ValueError(f"FusedLinear: {name}: expected no hooks, which would not be called")
        for what, given in _kind(linear).items():
            if given != expected[what]:
                raise ValueError(
                    f"FusedLinear: {name}: {what}: expected {expected[what]} as of {first}, "
                    f"got {given}"
                )
        if linear.is_packed:
            linear.packed()  # raises if it is for another kind of device


def _kind(linear: ResQLinear) -> dict[str, Any]:
    """What all parts must have in common."""
    return {
        "in_features": linear.in_features,
        "row_format": tuple(linear.row_format),
        "bias": linear.bias is not None,
        "dtype": linear.dtype,
        "device": getattr(linear.weight_scale, "device", None),  # None without a weight
    }
