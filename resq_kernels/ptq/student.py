"""A decoder layer that computes as the quantized one will, and whose weights can be trained."""

from __future__ import annotations

import torch
from torch.nn import functional

from resq_kernels import ops, reference
from resq_kernels.architecture import DOWN_PROJ, GATE_UP, LINEARS, O_PROJ, QKV, ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.formats import RowFormat
from resq_kernels.ptq.decoder import DecoderLayer, Layer, Rope
from resq_kernels.weights import round_weight, search_scale

BETAS = (0.9, 0.95)
"""Of Adam: a run has a few dozen steps, and the second moment must settle within twenty."""


class StudentLayer(DecoderLayer):
    """`DecoderLayer` with weights, inputs of linears, keys and values rounded.

    Every rounding passes gradients on as if it were the identity (the straight-through estimator,
    arXiv 1308.3432). Weights are rounded to nearest, with the scales that fit them at first. The
    linears multiply in float32: with bfloat16 enough codes differ to turn the gradients by 35 to
    50 degrees in the first layers (docs/notes/0033-distillation.md).

    Args:
        shape: sizes of the model.
        layer: its parameters; the weights, float32, are trained in place.
        rope: tables of `rope_tables`.
        config: how everything is rounded.
    """

    def __init__(self, shape: ModelShape, layer: Layer, rope: Rope, config: ResQConfig) -> None:
        super().__init__(shape, layer, rope)
        self.config = config
        self._scales = {
            name: [search_scale(part, bits) for part, bits in self._parts(name)] for name in LINEARS
        }
        for weight in layer.weights.values():
            weight.requires_grad_()
        # Fused: one pass over weights and moments instead of ten.
        self._adam = torch.optim.Adam(list(layer.weights.values()), betas=BETAS, fused=True)

    def train(self, x: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
        """One step of Adam on the weights.

        The layer is computed anew, so that one layer's activations are in memory at a time.

        Args:
            x: the input of the layer in `forward`.
            gradient: of the loss by its output.
            rate: the learning rate.

        Returns:
            The gradient of the loss by x, at the weights before the step.
        """
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            self.forward(x).backward(gradient)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        assert x.grad is not None
        return x.grad

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, float32, by name."""
        return {name: weight.detach() for name, weight in self.layer.weights.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and Adam's moments by name, from which training goes on to the same bits."""
        tensors = {f"{name}.weight": weight for name, weight in self.weights().items()}
        for name, weight in self.layer.weights.items():
            for moment, value in self._adam.state[weight].items():
                tensors[f"{name}.{moment}"] = value
        return tensors

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `state` gave."""
        with torch.no_grad():
            for name, weight in self.layer.weights.items():
                weight.copy_(tensors[f"{name}.weight"])
                self._adam.state[weight] = {
                    moment: tensors[f"{name}.{moment}"].to(weight.device)
                    for moment in ("step", "exp_avg", "exp_avg_sq")
                }

    def qkv_input(self, x: torch.Tensor) -> torch.Tensor:
        return self._rounded_rows(super().qkv_input(x), QKV[0])

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        queries, keys = self.rotate(queries, keys)
        if self.config.kv_bits == 4:
            hi_bits = 8 if self.config.method == "resq" else 4
            keys, values = (
                _straight_through(x, reference.kv_fake_quantize(x.detach(), hi_bits))
                for x in (keys, values)
            )
        attended = self.mix(queries, keys, values).flatten(2)
        if self.layer.o_order is not None:
            attended = attended[..., self.layer.o_order]
        return self._rounded_rows(attended, O_PROJ)

    def gate_up_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._rounded_rows(super().gate_up_input(hidden), GATE_UP[0])

    def down_input(self, gate_up_input: torch.Tensor) -> torch.Tensor:
        return self._rounded_rows(super().down_input(gate_up_input), DOWN_PROJ)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = _straight_through(self.layer.weights[name], self._rounded_weight(name))
        return functional.linear(x, weight, self.layer.biases.get(name))

    def _rounded_rows(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The input of a linear after a round trip through the kernels' codes."""
        rows = RowFormat.of(self.config, x.shape[-1], self._k_hi(name))._replace(packed=False)
        return _straight_through(x, ops.mixed_quantize(x.detach(), *rows).dequantize())

    def _rounded_weight(self, name: str) -> torch.Tensor:
        """A weight, rounded to nearest."""
        rounded = [
            round_weight(part, scale, bits) * scale[:, None]
            for (part, bits), scale in zip(self._parts(name), self._scales[name], strict=True)
        ]
        return torch.cat(rounded, dim=1)

    def _parts(self, name: str) -> list[tuple[torch.Tensor, int]]:
        """The INT4 and the INT8 columns of a weight, those that exist, and their bits."""
        weight = self.layer.weights[name].detach()
        k_lo = weight.shape[1] - self._k_hi(name)
        parts = [(weight[:, :k_lo], 4), (weight[:, k_lo:], 8)]
        return [(part, bits) for part, bits in parts if part.shape[1]]

    def _k_hi(self, name: str) -> int:
        return self.shape.k_hi(name, self.config.high_fraction)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of x."""
    result: torch.Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return result
