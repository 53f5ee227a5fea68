"""Rounds the rotated model layer by layer, each linear on the inputs that it gets at run time."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch

from resq_kernels.architecture import (
    DOWN_PROJ,
    GATE_UP,
    KEY_ROTATION,
    NORMS,
    O_PROJ,
    QKV,
    layer_prefix,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import QuantizedWeight
from resq_kernels.ptq.calibrate import batches, gram, layer_bar
from resq_kernels.ptq.decoder import DecoderLayer, Rope
from resq_kernels.ptq.embedding import embed
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.gptq import gptq
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace, error_piece, layer_piece
from resq_kernels.weights import quantize_weight


@torch.no_grad()
def quantize(
    model: SourceModel,
    rotation: Rotation | None,
    tokens: torch.Tensor,
    rope: Rope,
    config: ResQConfig,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
) -> None:
    """Writes two pieces per layer to the work folder: tensors under their names in a checkpoint
    (`layer_piece`), and the relative output error of every linear (`error_piece`).

    Calibration windows run through the layers quantized so far, with inputs, keys and values
    rounded as the kernels round them; within a layer, q, k, v come first, then o, gate and up,
    down. Memory: one layer in float32, the Hessian of its widest input, `BATCH_TOKENS` activations.
    """
    size = (*tokens.shape, model.shape.hidden)
    for index in layer_bar(range(model.shape.layers), "quantize", progress):
        if work.has(layer_piece(index)):
            continue
        states = work.hidden(f"rounded-{index:05d}", size)
        if index == 0 and not states.exists:
            states.begin().copy_(embed(model, rotation, tokens, config))
            states.finish()
        after = work.hidden(f"rounded-{index + 1:05d}", size)
        layer = fuse_layer(model, index, rotation, config.high_fraction, device)
        decoder = DecoderLayer(model.shape, layer, rope, config)
        weights, errors = _quantize_layer(decoder, states.read(), after.begin(), config, device)
        after.finish()
        prefix = layer_prefix(index)
        piece: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            piece |= weight.named(prefix + name)
        dtype = model.reader.info(f"{prefix}{NORMS[0]}.weight").dtype
        for name in NORMS:
            gain = layer.norms.get(name, torch.ones(model.shape.hidden))
            piece[f"{prefix}{name}.weight"] = gain.to(dtype)
        for name, bias in layer.biases.items():
            dtype = model.reader.info(f"{prefix}{name}.bias").dtype
            piece[f"{prefix}{name}.bias"] = bias.to(dtype)
        if layer.key_rotation is not None:
            piece[prefix + KEY_ROTATION] = layer.key_rotation
        # In this order: once its piece exists, a layer counts as finished, its errors included.
        work.save(error_piece(index), errors)
        work.save(layer_piece(index), piece)
        states.delete()
    work.hidden(f"rounded-{model.shape.layers:05d}", size).delete()


def _quantize_layer(
    decoder: DecoderLayer,
    states: torch.Tensor,
    after: torch.Tensor,
    config: ResQConfig,
    device: str,
) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor]]:
    """Rounds the seven linears in forward order; fills `after` with the layer's output.

    Returns:
        The weights and their relative output errors, float64 [1], by the names of the linears.
    """
    weights: dict[str, QuantizedWeight] = {}
    errors: dict[str, torch.Tensor] = {}

    def round_group(names: tuple[str, ...], inputs: Callable[[slice], torch.Tensor]) -> None:
        hessian = _hessian(inputs, states.shape)
        for name in names:
            weights[name] = _round_weight(decoder, name, hessian, config)
            dequantized = weights[name].dequantize()
            error = output_error(decoder.layer.weights[name], dequantized, hessian)
            errors[name] = torch.tensor([error], dtype=torch.float64)
            decoder.layer.weights[name] = dequantized

    def read(part: slice) -> torch.Tensor:
        return states[part].to(device)

    round_group(QKV, lambda part: decoder.qkv_input(read(part)))
    round_group((O_PROJ,), lambda part: decoder.o_input(decoder.qkv_input(read(part))))
    # From here on every pass starts between attention and MLP.
    for part in batches(*states.shape[:2]):
        x = read(part)
        after[part] = decoder.after_attention(x, decoder.o_input(decoder.qkv_input(x))).cpu()
    round_group(GATE_UP, lambda part: decoder.gate_up_input(after[part].to(device)))

    def down_input(part: slice) -> torch.Tensor:
        return decoder.down_input(decoder.gate_up_input(after[part].to(device)))

    round_group((DOWN_PROJ,), down_input)
    for part in batches(*states.shape[:2]):
        after[part] = decoder.output(after[part].to(device), down_input(part)).cpu()
    return weights, errors


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W') x|| / ||W x|| over the calibration inputs x with E[x x^T] = `hessian`.

    Formula: sqrt(tr(D H D^T) / tr(W H W^T)), D = W - W'; 0 where W x is 0 everywhere.
    """

    def power(matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix.double()
        return ((matrix @ hessian) * matrix).sum()

    total = power(weight)
    return float((power(weight - rounded) / total).clamp_min(0).sqrt()) if total > 0 else 0.0


def _hessian(inputs: Callable[[slice], torch.Tensor], size: tuple[int, ...]) -> torch.Tensor:
    """E[x x^T] in float64 over all windows."""
    total = reduce(torch.add, (gram(inputs(part)) for part in batches(size[0], size[1])))
    return total / (size[0] * size[1])


def _round_weight(
    decoder: DecoderLayer, name: str, hessian: torch.Tensor, config: ResQConfig
) -> QuantizedWeight:
    k_hi = decoder.shape.k_hi(name, config.high_fraction)
    if config.weights == "rtn":
        return quantize_weight(decoder.layer.weights[name], k_hi)
    return gptq(decoder.layer.weights[name], hessian, k_hi, config.damping)
