"""Distillation: trains the INT8 columns and the rows' gains of the quantized model to predict as
the 16-bit model does."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional

from resq_kernels.architecture import layer_prefix
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.calibrate import float_states
from resq_kernels.ptq.decoder import Rope, product_dtype
from resq_kernels.ptq.embedding import embedded
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.rounded import stored_layer
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.student import StudentLayer
from resq_kernels.ptq.training import passes, train
from resq_kernels.ptq.vocabulary import FloatHead
from resq_kernels.ptq.workspace import (
    DISTILLED,
    Workspace,
    distilled_piece,
    layer_piece,
    target_piece,
)

WARMUP_STEPS = 5
STATE = "distill-state"


@torch.no_grad()
def distill(
    model: SourceModel,
    rotation: Rotation | None,
    tokens: torch.Tensor,
    rope: Rope,
    config: ResQConfig,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
) -> list[float]:
    """Writes a piece per layer with the tensors that it changes (`distilled_piece`).

    Formula: minimises mean over tokens of KL(p || q), p the next-token distribution of the 16-bit
    model and q that of the quantized one, over the INT8 columns of all linears and a gain per row
    (`StudentLayer`); 4-bit codes stay as they are. Adam, one window a step, `distill_epochs`
    passes in random order; the learning rate rises over 5 steps to `distill_lr` and falls to 0 as
    a cosine.

    Memory: `check_memory`, and the activations of one layer for one window. The pieces of
    `quantize` and the final states of the float model (`calibrate`) must be in the work folder.

    Returns:
        The divergence before each step, in nats.

    Source: the loss is LLM-QAT's (arXiv 2305.17888), on calibration windows instead of generated
    text; what is trained is our own: docs/notes/0033-distillation.md.
    """
    if work.has(DISTILLED):
        return work.load(DISTILLED)["divergences"].tolist()
    states = embedded(model, rotation, tokens, config, work)
    final = float_states(work, tokens, model.shape, model.shape.layers)
    inputs, targets = states.read(), final.read()
    head = _Head(model, rotation, product_dtype(model.dtype, device), device)
    layers = [
        _student(model, index, rope, config, work, device) for index in range(model.shape.layers)
    ]
    divergences = _restore(layers, work)
    order = passes(len(tokens), config.distill_epochs, config.seed)

    def step(number: int, window: int) -> float:
        x, target = (t[window].to(device) for t in (inputs, targets))
        rate = learning_rate(number, len(order), config.distill_lr or 0.0)
        return _step(layers, head, x, target, rate)

    failure = (
        "distill: expected a finite divergence, got {loss} in step {step}; "
        f"distill_lr {config.distill_lr} is too large for this model"
    )
    save = partial(_save, layers, divergences, work)
    train("distill", "KL", order, divergences, step, save, failure, progress)
    for index, layer in enumerate(layers):
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in layer.weights().items():
            tensors |= weight.named(layer_prefix(index) + name)
        work.save(distilled_piece(index), tensors)
    work.save(DISTILLED, {"divergences": torch.tensor(divergences, dtype=torch.float64)})
    work.delete(STATE)
    states.delete()
    final.delete()
    return divergences


def _student(
    model: SourceModel, index: int, rope: Rope, config: ResQConfig, work: Workspace, device: str
) -> StudentLayer:
    """A layer as `quantize` left it."""
    piece = {name: tensor.to(device) for name, tensor in work.load(layer_piece(index)).items()}
    layer, weights = stored_layer(piece.__getitem__, index, model.shape, config)
    targets = {name: t.to(device) for name, t in work.load(target_piece(index)).items()}
    return StudentLayer(model.shape, layer, rope, config, weights, targets)


def _step(
    layers: list[StudentLayer],
    head: _Head,
    x: torch.Tensor,
    target: torch.Tensor,
    rate: float,
) -> float:
    """Trains on one window, [tokens, hidden] at the first layer and after the float model's last;
    returns the divergence before it."""
    inputs = [x[None]]
    for layer in layers:
        inputs.append(layer.forward(inputs[-1]))
    divergence, gradient = head.divergence(inputs.pop()[0], target)
    gradient = gradient[None]
    for layer in reversed(layers):
        gradient = layer.backward(inputs.pop(), gradient)
        layer.step(rate)
    return divergence


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of a step from 0 to steps - 1: linear to the peak over 5 steps, times a cosine to 0."""
    return (
        peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )


class _Head:
    """The float model's head on states of the float model and of the student.

    Args:
        model: the source.
        rotation: that of the student's states, or None.
        products: dtype of the head's products.
        device: where they are computed.
    """

    def __init__(
        self, model: SourceModel, rotation: Rotation | None, products: torch.dtype, device: str
    ) -> None:
        self._float = FloatHead(model, products, device)
        self._back = None if rotation is None else rotation.hidden.T.float().to(device)

    def divergence(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean KL(p || q) over the tokens, and its gradient by the student's states.

        Formula: the gradient by the logits of a token is (q - p) / tokens.

        Args:
            states: float32 [tokens, hidden] after the student's last layer.
            targets: the same of the float model.
        """
        wanted = self._float.norm(targets)

        def of_rows(student: torch.Tensor, rows: slice) -> tuple[float, torch.Tensor]:
            teacher = functional.log_softmax(self._float.logits(wanted[rows]), -1)
            p = teacher.exp()
            total = float((p * (teacher - student)).sum(dtype=torch.float64))
            return total, student.exp_().sub_(p)

        return self._float.mean_loss(states, of_rows, self._back)


def _save(layers: list[StudentLayer], divergences: list[float], work: Workspace) -> None:
    tensors = {"divergences": torch.tensor(divergences, dtype=torch.float64)}
    for index, layer in enumerate(layers):
        tensors |= {f"{index}.{name}": tensor for name, tensor in layer.state().items()}
    work.save(STATE, tensors)


def _restore(layers: list[StudentLayer], work: Workspace) -> list[float]:
    """Takes over the last state, if there is one; returns the divergences so far."""
    if not work.has(STATE):
        return []
    tensors = work.load(STATE)
    for index, layer in enumerate(layers):
        prefix = f"{index}."
        layer.restore(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
    return tensors["divergences"].tolist()
