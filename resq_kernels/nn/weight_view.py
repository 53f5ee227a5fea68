"""WeightView: what code reads of a weight that is quantized: its shape, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch


class WeightView(torch.Tensor):
    """A tensor without memory: every operation on it raises and says how to get the values.

    Libraries and users read `model.get_input_embeddings().weight.shape`, `.dtype` and `.device`.
    A dequantized copy would answer them at the cost of the whole matrix in floats, and whatever is
    written into a copy is lost.

    Args:
        owner: name of the class whose weight this is.
        shape: [N, K].
        dtype: compute dtype of the layer.
        device: where its tensors are.
    """

    owner: str

    @staticmethod
    def __new__(
        cls: type[WeightView],
        owner: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> WeightView:
        view: WeightView = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        view.owner = owner
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without cls
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        owner = next(arg.owner for arg in args if isinstance(arg, cls))
        raise RuntimeError(
            f"{owner}: weight: expected a use of its shape, dtype or device, got {func}: the "
            "weight is quantized; dequantize() copies its values, weight_scale and codes() give "
            "the stored ones"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # torch passes no argument
        shape = list(self.shape)
        return f"WeightView({self.owner}, {shape}, {self.dtype}, device={str(self.device)!r})"
