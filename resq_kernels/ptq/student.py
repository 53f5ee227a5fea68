"""The quantized decoder layer, whose INT8 columns and rows' gains can be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from resq_kernels.architecture import DOWN_PROJ, GATE_UP, O_PROJ, QKV, ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.formats import MixedTensor, QuantizedWeight
from resq_kernels.ptq.decoder import Layer, Rope, product_dtype
from resq_kernels.ptq.rounded import GROUPS, RoundedLayer

BETAS = (0.9, 0.95)
"""Of Adam: a run has a few dozen steps, and the second moment must settle within twenty."""
GAIN_RATE = 0.03
"""Learning rate of a row's gain, in nats, where that of an INT8 weight is one of its steps."""


class StudentLayer(RoundedLayer):
    """`RoundedLayer` with a training of what needs no 4-bit code to change.

    Formula: a linear is y = e^g (s_lo Q_lo x_lo + s_hi clamp(rint(v)) x_hi), row by row; v, the
    INT8 columns in steps of their scale, and g, which starts at 0, are trained.

    The forward pass is the quantized model's, by its operators. Gradients pass every rounding as if
    it were the identity (the straight-through estimator, arXiv 1308.3432); their products are in
    bfloat16 where the device has instructions for it.

    Args:
        shape: sizes of the model.
        layer: norms, biases and key rotation; its weights are not used.
        rope: tables of `rope_tables`.
        config: how inputs, keys and values are rounded.
        weights: the rounded weights by name.
        targets: what their INT8 columns were rounded from, v, float32 [rows, k_hi] by name.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer: Layer,
        rope: Rope,
        config: ResQConfig,
        weights: Mapping[str, QuantizedWeight],
        targets: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(shape, layer, rope, config)
        self._scales: dict[tuple[str, ...], torch.Tensor] = {}
        self._high: dict[tuple[str, ...], torch.Tensor] = {}
        self._gains: dict[tuple[str, ...], torch.Tensor] = {}
        for names in GROUPS:
            weight = QuantizedWeight.cat([weights[name] for name in names])
            self.round(names, weight)
            self._scales[names] = weight.weight_scale
            self._high[names] = torch.cat([targets[name] for name in names])
            self._gains[names] = torch.zeros_like(weight.weight_scale[:, 0])
        device = str(self._gains[QKV].device)
        self._products = product_dtype(torch.bfloat16, device)
        groups = [{"params": list(p.values()), "lr": 0.0} for p in (self._high, self._gains)]
        self._adam = torch.optim.Adam(groups, betas=BETAS)

    def backward(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Sets the gradients for `step`.

        The layer is computed anew, so that one layer's activations are in memory at a time.

        Args:
            x: the input of the layer in `forward`.
            gradient: of the loss by its output.

        Returns:
            The gradient of the loss by x.
        """
        qkv_input = self.qkv_input(x)
        qkv = self.qkv(qkv_input).requires_grad_()
        with torch.enable_grad():
            attended = self._attention(qkv)
        o_input = self.round_attended(self.attend(*self.split_heads(qkv.detach())))
        o = self.linear(o_input, (O_PROJ,))
        hidden = x + o
        gate_up_input = self.gate_up_input(hidden)
        gate_up = self.gate_up(gate_up_input)
        down_input = self.round_product(gate_up)
        down = self.linear(down_input, (DOWN_PROJ,))

        by_product = self._through_linear((DOWN_PROJ,), down_input, down, gradient)
        by_gate_up = _through(
            lambda both: self.float.swiglu(*both.chunk(2, dim=-1)), gate_up, by_product
        )
        by_normed = self._through_linear(GATE_UP, gate_up_input, gate_up, by_gate_up)
        by_hidden = gradient + _through(self.float.gate_up_input, hidden, by_normed)
        by_attended = self._through_linear((O_PROJ,), o_input, o, by_hidden)
        (by_qkv,) = torch.autograd.grad(attended, qkv, by_attended)
        by_normed = self._through_linear(QKV, qkv_input, qkv.detach(), by_qkv)
        return by_hidden + _through(self.float.qkv_input, x, by_normed)

    def step(self, rate: float) -> None:
        """One step of Adam, with the gradients of `backward`; INT8 columns move by about `rate`
        steps of their scale."""
        for group, factor in zip(self._adam.param_groups, (1.0, GAIN_RATE), strict=True):
            group["lr"] = factor * rate
        self._adam.step()
        self._adam.zero_grad()
        self._round()

    def weights(self) -> dict[str, QuantizedWeight]:
        """The weights as they are now, by name."""
        weights: dict[str, QuantizedWeight] = {}
        for names in GROUPS:
            parts = self.packed[names].codes().split(self.rows(names))
            weights |= zip(names, parts, strict=True)
        return weights

    def state(self) -> dict[str, torch.Tensor]:
        """What is trained and Adam's moments, from which training goes on to the same bits."""
        tensors = {}
        for name, parameter in self._trained():
            tensors[name] = parameter
            for moment, value in self._adam.state[parameter].items():
                tensors[f"{name}.{moment}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, parameter in self._trained():
            parameter.copy_(tensors[name])
            self._adam.state[parameter] = {
                "step": tensors[f"{name}.step"],  # Adam counts on the CPU
                "exp_avg": tensors[f"{name}.exp_avg"].to(parameter.device),
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter.device),
            }
        self._round()

    def _trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that is trained, and its name in a state."""
        for names in GROUPS:
            yield f"{names[0]}.high", self._high[names]
            yield f"{names[0]}.gain", self._gains[names]

    def _through_linear(
        self,
        names: tuple[str, ...],
        inputs: MixedTensor,
        output: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        """Sets the gradients of a linear; returns that by its input."""
        weight = self.packed[names].codes()
        bias = self.bias(names)
        product = output if bias is None else output - bias
        self._gains[names].grad = (gradient * product).flatten(0, -2).sum(0)
        high = inputs.dequantize()[..., weight.k_lo :]
        x, by_output = (t.flatten(0, -2).to(self._products) for t in (high, gradient))
        self._high[names].grad = (by_output.T @ x).float().mul_(weight.weight_scale[:, 1:])
        by_input = by_output @ weight.dequantize().to(self._products)
        return by_input.float().unflatten(0, inputs.params.shape[:-1])

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """`attend`, in float32, with the gradient that passes the rounding of keys and values."""
        heads = self.split_heads(qkv)
        with torch.no_grad():
            rounded = self.rounded_heads(*heads)
        exact = self.exact_heads(*heads)
        queries, keys, values = (
            # Has the value of the first and the gradient of the second.
            r.detach() + (e - e.detach())
            for r, e in zip(rounded, exact, strict=True)
        )
        return self.join_heads(self.float.mix(queries, keys, values))

    def _round(self) -> None:
        for names in GROUPS:
            codes = self.packed[names].codes().weight_lo
            high = self._high[names].round().clamp_(-128, 127).to(torch.int8)
            scale = self._scales[names] * self._gains[names].exp()[:, None]
            self.round(names, QuantizedWeight(codes, high, scale))


def _through(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """The gradient by x, from that by function(x)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (by_x,) = torch.autograd.grad(function(x), x, gradient)
    return by_x
