"""FusedLinear: the linears that read the same rows (q, k, v; gate, up) as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from resq_kernels.formats import MixedTensor, PackedWeight
from resq_kernels.nn.linear import ResQLinear

_TENSORS = ("weight_lo", "weight_hi", "weight_scale", "bias")


class FusedLinear(ResQLinear):
    """[y_1 | y_2 | ...] of linears that read the same rows, by one `mixed_gemm`; the same bits.

    Args:
        parts: the packed linears by name, in the order of the result. They have the same K, K_hi,
            row format, dtype and device, and all or none has a bias. Their tensors are copied.

    Attributes:
        rows: name of a part -> its N.

    Raises:
        ValueError: the linears differ.
        RuntimeError: a linear is not packed.
    """

    def __init__(self, parts: Mapping[str, ResQLinear]) -> None:
        kinds = {name: _kind(linear) for name, linear in parts.items()}
        if len(set(kinds.values())) != 1:
            raise ValueError(
                "FusedLinear: parts: expected linears with the same columns, row format, bias, "
                f"dtype and device, got {kinds}"
            )
        linears = list(parts.values())
        weight = PackedWeight.cat([linear.packed() for linear in linears])
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        first = linears[0]
        super().__init__(
            first.in_features,
            weight.n,
            high_columns=first.high_columns,
            dtype=first.dtype,
            device="meta",
        )
        self.row_format = first.row_format
        self.rows = {name: linear.out_features for name, linear in parts.items()}
        self.hold(weight, torch.cat(biases) if biases else None)

    def split(self) -> dict[str, ResQLinear]:
        """The parts as linears of their own, around slices where blocks of rows allow it."""
        rows = list(self.rows.values())
        biases = [None] * len(rows) if self.bias is None else self.bias.split(rows)
        weights = self.packed().split(rows)
        return {
            name: ResQLinear.of(weight, bias, self.row_format, self.dtype)
            for name, weight, bias in zip(self.rows, weights, biases, strict=True)
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows}"


class FusesLinears(nn.Module):
    """A module that can replace its linears `PARTS` by one `FusedLinear` named `FUSED`.

    Before `fuse`, and after `unfuse`, the parts are ordinary modules that are called one by one:
    that is how checkpoints are loaded, and how a part gets a hook or an adapter. `state_dict` and
    `load_state_dict` use the names of the parts either way.
    """

    FUSED: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.register_module(self.FUSED, None)
        module: Any = self  # torch leaves these two without types
        module.register_state_dict_post_hook(_split_state)
        module.register_load_state_dict_pre_hook(_join_state)

    @property
    def fused(self) -> FusedLinear | None:
        """The fused linear, or None while the parts are apart."""
        found: FusedLinear | None = getattr(self, self.FUSED)
        return found

    def fuse(self) -> None:
        """Replaces the packed parts by a `FusedLinear`.

        Raises:
            ValueError: the parts differ in more than their rows.
            RuntimeError: a part is not packed.
        """
        if self.fused is None:
            # Tensors that outlive the caller's inference mode.
            with torch.inference_mode(False):
                fused = FusedLinear({part: getattr(self, part) for part in self.PARTS})
            for part in self.PARTS:
                delattr(self, part)
            setattr(self, self.FUSED, fused)

    def unfuse(self) -> None:
        """Replaces the `FusedLinear` by its parts."""
        if (fused := self.fused) is not None:
            setattr(self, self.FUSED, None)
            with torch.inference_mode(False):
                parts = fused.split()
            for part, linear in parts.items():
                setattr(self, part, linear)

    def project(self, x: torch.Tensor | MixedTensor) -> torch.Tensor:
        """[..., N_1 + N_2 + ...] of x [..., K]: the results of the parts next to each other."""
        if (fused := self.fused) is not None:
            joined: torch.Tensor = fused(x)
            return joined
        return torch.cat([getattr(self, part)(x) for part in self.PARTS], dim=-1)


def _kind(linear: ResQLinear) -> tuple[Any, ...]:
    """What must be the same for one product to stand for several linears."""
    place = (linear.dtype, str(linear.weight_scale.device))
    return (linear.in_features, tuple(linear.row_format), linear.bias is not None, *place)


def _split_state(
    module: FusesLinears, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Of a `state_dict`: gives the rows of the fused tensors the names of the parts."""
    if (fused := module.fused) is None:
        return
    for name in _TENSORS:
        whole = state.pop(f"{prefix}{module.FUSED}.{name}", None)
        if whole is None:
            continue
        parts = whole.split(list(fused.rows.values()))
        if name in ("weight_lo", "weight_hi"):
            # Tensors of their own: who saves them must not find them in one storage, and copy.
            parts = [part.clone() for part in parts]
        state |= {f"{prefix}{p}.{name}": t for p, t in zip(fused.rows, parts, strict=True)}


def _join_state(
    module: FusesLinears,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Of `load_state_dict`: joins the tensors of the parts; what is missing stays as it is."""
    if (fused := module.fused) is None:
        return
    own = {name: tensor for name, tensor in fused.state_dict().items() if name in _TENSORS}
    for name, whole in own.items():
        parts = []
        for part, old in zip(fused.rows, whole.split(list(fused.rows.values())), strict=True):
            key = f"{prefix}{part}.{name}"
            new = state.pop(key, None)
            if new is None:
                missing_keys.append(key)
            elif new.shape != old.shape or (name != "bias" and new.dtype != old.dtype):
                error_msgs.append(
                    f"FusedLinear: {key}: expected {old.dtype} {list(old.shape)}, "
                    f"got {new.dtype} {list(new.shape)}"
                )
            else:
                old = new
            parts.append(old)
        state[f"{prefix}{module.FUSED}.{name}"] = torch.cat(parts)
