"""Learns the rotations: turns the bases of the residual stream and of values, each block of INT4
or INT8 columns in itself, so that the model with rounded activations predicts better."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional

from resq_kernels.architecture import EMBEDDING
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.cayley import cayley, direction, step_size
from resq_kernels.ptq.decoder import Rope, product_dtype
from resq_kernels.ptq.rotate import Rotation, block_masks
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.training import passes, train
from resq_kernels.ptq.turned import TurnedLayer, Turns
from resq_kernels.ptq.vocabulary import FloatHead
from resq_kernels.ptq.workspace import LEARNED, Workspace

STATE = "learn-state"


@torch.no_grad()
def learn(
    model: SourceModel,
    rotation: Rotation,
    tokens: torch.Tensor,
    rope: Rope,
    config: ResQConfig,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
) -> Rotation:
    """The rotation with U_A and U_B learned; keys, factors and the order of columns stay.

    Formula: minimises the mean cross entropy of the next token of the model whose activations, keys
    and values are rounded, and whose weights are not, over U_A blockdiag(R) and U_B blockdiag(R),
    every R orthogonal, from R = I. No block crosses the border between INT4 and INT8. Gradient
    descent by Cayley transforms (`cayley`), one window a step, in passes over the calibration
    windows in random order; the rate falls from `rotation_lr` to 0 in a line over `rotation_steps`
    steps.

    Memory: `check_memory`; the layers' inputs and one layer's activations for one window.

    Returns:
        The rotation; the piece LEARNED also keeps "losses", that before each step, in nats.

    Raises:
        ValueError: a loss is not finite.

    Source: SpinQuant, arXiv 2405.16406: R1 and R2, learned with weights in 16 bits where GPTQ
    rounds them afterwards. It has one R2 a layer; here every kv head has its own.
    """
    if work.has(LEARNED):
        tensors = work.load(LEARNED)
        del tensors["losses"]
        return dataclasses.replace(rotation, **tensors)
    turns = Turns.begin(rotation, product_dtype(model.dtype, device), device)
    layers = [
        TurnedLayer(model, index, rotation, turns, rope, config, device)
        for index in range(model.shape.layers)
    ]
    head = _Head(model, turns.matrix.dtype, device)
    losses = _restore(turns, work)
    masks = [mask.to(device) for mask in block_masks(model.shape, config)]
    order = _order(len(tokens), config)

    def step(number: int, window: int) -> float:
        loss = _gradients(layers, head, turns, tokens[window].to(device))
        if math.isfinite(loss):
            _step(turns, masks, learning_rate(number, len(order), config.rotation_lr or 0.0))
        return loss

    def save() -> None:
        work.save(STATE, _state(turns, losses))

    failure = (
        "rotations: expected a finite loss, got {loss} in step {step}; the model overflows on "
        "these tokens"
    )
    train("rotations", "loss", order, losses, step, save, failure, progress)
    work.save(LEARNED, _state(turns, losses))
    work.delete(STATE)
    return dataclasses.replace(rotation, **turns.matrices())


def learning_rate(step: int, steps: int, first: float) -> float:
    """Of a step from 0 to steps - 1: in a line from the first to 0 after the last."""
    return first * (1 - step / steps)


def _gradients(layers: list[TurnedLayer], head: _Head, turns: Turns, tokens: torch.Tensor) -> float:
    """Sets the gradients of the turns for a window, int64 [tokens]; returns its loss.

    Every layer is computed a second time for its gradients, so that one layer's activations are in
    memory at a time.
    """
    inputs = [head.embed(tokens)[None]]
    for layer in layers:
        inputs.append(layer.forward(inputs[-1]))
    loss, gradient = head.loss(inputs.pop()[0], tokens)
    gradient = gradient[None]
    for layer in reversed(layers):
        x = inputs.pop().requires_grad_()
        with torch.enable_grad():
            output = layer.forward(x)
        output.backward(gradient)
        assert x.grad is not None
        gradient = x.grad
    return loss


def _step(turns: Turns, masks: list[torch.Tensor], rate: float) -> None:
    """One step of descent for U_A and for U_B of every kv head."""
    found = []
    for gradient, mask in zip(turns.gradients(), masks, strict=True):
        ascent = direction(gradient, mask)
        found.append(cayley(ascent, step_size(ascent, rate)))
    turns.multiply(*found)


class _Head:
    """Embedding and head of the float model.

    Args:
        model: the source.
        products: dtype of the head's products.
        device: where they are computed.
    """

    def __init__(self, model: SourceModel, products: torch.dtype, device: str) -> None:
        self._float = FloatHead(model, products, device)
        self._rows = model.reader.load(EMBEDDING)
        model.check_finite(EMBEDDING, self._rows)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> float32 [tokens, hidden]."""
        return self._rows[tokens.cpu()].to(tokens.device).float()

    def loss(self, states: torch.Tensor, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean cross entropy of the next tokens, and its gradient by the states.

        Formula: the gradient by the logits of a token is (q - [next token]) / (tokens - 1).

        Args:
            states: float32 [tokens, hidden] after the last layer.
            tokens: int64 [tokens].
        """

        def of_rows(q: torch.Tensor, rows: slice) -> tuple[float, torch.Tensor]:
            wanted = tokens[1:][rows]
            total = -float(q.gather(1, wanted[:, None]).sum(dtype=torch.float64))
            q.exp_()[torch.arange(len(wanted), device=q.device), wanted] -= 1
            return total, q

        loss, gradient = self._float.mean_loss(states[:-1], of_rows)
        return loss, functional.pad(gradient, (0, 0, 0, 1))  # the last token predicts none


def _order(windows: int, config: ResQConfig) -> list[int]:
    """The window of every step."""
    steps = config.rotation_steps or 0
    return passes(windows, -(-steps // windows), config.seed)[:steps]


def _state(turns: Turns, losses: list[float]) -> dict[str, torch.Tensor]:
    return turns.matrices() | {"losses": torch.tensor(losses, dtype=torch.float64)}


def _restore(turns: Turns, work: Workspace) -> list[float]:
    """Takes over the last state, if there is one; returns the losses so far."""
    if not work.has(STATE):
        return []
    tensors = work.load(STATE)
    losses = tensors.pop("losses").tolist()
    turns.restore(tensors)
    return losses
