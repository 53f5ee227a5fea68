"""Rounds the rotated model layer by layer, each linear on the inputs that it gets at run time, or
would get if no input were rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar, cast

import torch

from resq_kernels.architecture import (
    DOWN_PROJ,
    GATE_UP,
    K_PROJ,
    KEY_ROTATION,
    O_PROJ,
    Q_PROJ,
    QKV,
    ModelShape,
    layer_prefix,
)
from resq_kernels.config import ResQConfig
from resq_kernels.formats import MixedTensor, QuantizedWeight
from resq_kernels.ptq.calibrate import batches, layer_bar
from resq_kernels.ptq.decoder import DecoderLayer, Rope
from resq_kernels.ptq.embedding import embedded
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.gptq import gptq
from resq_kernels.ptq.gram import Gram
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.rounded import RoundedLayer
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.token_weights import attention_weights, looked_at
from resq_kernels.ptq.workspace import Workspace, error_piece, layer_piece, target_piece
from resq_kernels.weights import quantize_weight

ERROR_ROWS = 4096
"""Rows of a weight whose output error is computed at once."""

Rows = TypeVar("Rows", MixedTensor, torch.Tensor)


class _Steps(Protocol[Rows]):
    """A layer, cut at the inputs of its linears: `RoundedLayer`, or exact inputs in `DecoderLayer`.

    The linears of a step are rounded (`round`) before the step that multiplies with them.
    """

    def qkv_input(self, x: torch.Tensor) -> Rows: ...
    def o_input(self, qkv_input: Rows) -> Rows: ...
    def after_attention(self, x: torch.Tensor, o_input: Rows) -> torch.Tensor: ...
    def gate_up_input(self, hidden: torch.Tensor) -> Rows: ...
    def down_input(self, gate_up_input: Rows) -> Rows: ...
    def output(self, hidden: torch.Tensor, down_input: Rows) -> torch.Tensor: ...
    def round(self, names: tuple[str, ...], weight: QuantizedWeight) -> None: ...


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
    (`layer_piece`), and the relative output error of every linear (`error_piece`); before a
    distillation also what the INT8 columns were rounded from (`target_piece`).

    Calibration windows run through the layers quantized so far, on the operators that will run
    them, or with `config.hessian_inputs` "exact" through their weights alone, in float32; within a
    layer, q, k, v come first, then o, gate and up, down. Memory: one layer in float32, the Hessian
    of its widest input three times, `BATCH_TOKENS` activations; hidden states and one linear's
    input live in the work folder.
    """
    size = (*tokens.shape, model.shape.hidden)
    for index in layer_bar(range(model.shape.layers), "quantize", progress):
        if work.has(layer_piece(index)):
            continue
        if index == 0:
            states = embedded(model, rotation, tokens, config, work)
        else:
            states = work.hidden(f"rounded-{index:05d}", size)
        after = work.hidden(f"rounded-{index + 1:05d}", size)
        layer = fuse_layer(model, index, rotation, config, device)
        exact = DecoderLayer(model.shape, layer, rope)
        rounded = RoundedLayer(model.shape, layer, rope, config)
        both = states.read(), after.begin()
        if config.hessian_inputs == "exact":
            found = _quantize_layer(exact, exact, config, *both, work, device)
        else:
            found = _quantize_layer(rounded, exact, config, *both, work, device)
        weights, targets, errors = found
        after.finish()
        prefix = layer_prefix(index)
        piece: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            piece |= weight.named(prefix + name)
        for name, width in model.shape.norms.items():
            gain = layer.norms.get(name, torch.ones(width))
            dtype = model.reader.info(f"{prefix}{name}.weight").dtype
            piece[f"{prefix}{name}.weight"] = gain.to(dtype)
        for name, bias in layer.biases.items():
            dtype = model.reader.info(f"{prefix}{name}.bias").dtype
            piece[f"{prefix}{name}.bias"] = bias.to(dtype)
        if layer.key_rotation is not None:
            piece[prefix + KEY_ROTATION] = layer.key_rotation
        # In this order: once its piece exists, a layer counts as finished, with the others.
        work.save(error_piece(index), errors)
        if config.distill_epochs:
            work.save(target_piece(index), targets)
        work.save(layer_piece(index), piece)
        states.delete()
    work.hidden(f"rounded-{model.shape.layers:05d}", size).delete()


def _quantize_layer(
    decoder: _Steps[Rows],
    exact: DecoderLayer,
    config: ResQConfig,
    states: torch.Tensor,
    after: torch.Tensor,
    work: Workspace,
    device: str,
) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rounds the seven linears in forward order; fills `after` with the layer's output.

    Args:
        decoder: gives the inputs of the linears.
        exact: has the weights; those of the linears that are rounded leave it, or are replaced.
        config: how weights are rounded, and tokens weighted.
        states: the layer's input, float32 [windows, seqlen, hidden].
        after: gets its output.
        work: keeps inputs.
        device: where the layer is computed.

    Returns:
        The weights, what their INT8 columns were rounded from, float32 [rows, k_hi] in steps of
        their scale, and their relative output errors, float64 [1], by the names of the linears.
    """
    weights: dict[str, QuantizedWeight] = {}
    targets: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    parts = list(batches(*states.shape[:2]))
    shape = exact.shape

    def round_group(names: tuple[str, ...], inputs: Iterable[Rows]) -> None:
        gram = Gram(shape.linear(names[0])[1], device)
        weighted = names == QKV and config.token_weights == "attention"
        for given in inputs:
            x = given.dequantize() if isinstance(given, MixedTensor) else given
            gram.add(x, _token_weights(exact, x) if weighted else None)
        hessian = gram.mean()
        whole = torch.cat([exact.layer.weights.pop(name) for name in names])
        rounded, high = _round_weight(shape, config, names[0], whole, hessian)
        decoder.round(names, rounded)
        rows = [shape.linear(name)[0] for name in names]
        weights.update(zip(names, rounded.split(rows), strict=True))
        targets.update(zip(names, high.split(rows), strict=True))
        pairs = zip(whole.split(rows), rounded.dequantize().split(rows), strict=True)
        for name, (weight, other) in zip(names, pairs, strict=True):
            error = output_error(weight, other, hessian)
            errors[name] = torch.tensor([error], dtype=torch.float64)

    def read(part: slice) -> torch.Tensor:
        return states[part].to(device)

    def between(part: slice) -> torch.Tensor:
        return after[part].to(device)

    def gate_up_inputs() -> Iterator[Rows]:
        for part, given in zip(parts, attended.read(), strict=True):
            hidden = decoder.after_attention(read(part), given)
            after[part] = hidden.cpu()
            yield decoder.gate_up_input(hidden)

    round_group(QKV, (decoder.qkv_input(read(part)) for part in parts))
    attended: _Inputs[Rows] = _Inputs(work, parts, device)
    inputs = (decoder.o_input(decoder.qkv_input(read(part))) for part in parts)
    round_group((O_PROJ,), attended.keep(inputs))
    round_group(GATE_UP, gate_up_inputs())
    products: _Inputs[Rows] = _Inputs(work, parts, device)
    inputs = (decoder.down_input(decoder.gate_up_input(between(part))) for part in parts)
    round_group((DOWN_PROJ,), products.keep(inputs))
    for part, given in zip(parts, products.read(), strict=True):
        after[part] = decoder.output(between(part), given).cpu()
    return weights, targets, errors


def _token_weights(exact: DecoderLayer, qkv_input: torch.Tensor) -> torch.Tensor:
    """`attention_weights` of the input of q, k and v; an eighth of the queries is computed."""
    looked = looked_at(qkv_input.shape[1], qkv_input.device)
    queries = exact.turned(qkv_input[:, looked], Q_PROJ, looked)
    return attention_weights(queries, exact.turned(qkv_input, K_PROJ))


class _Inputs(Generic[Rows]):
    """The inputs of a linear for all batches: in files, so that memory stays bounded.

    Computing o_proj's inputs takes attention, and down_proj's two thirds of a layer's products;
    those of q, k, v and of gate, up are computed anew where they are needed.
    """

    def __init__(self, work: Workspace, parts: list[slice], device: str) -> None:
        self._work, self._parts, self._device = work, parts, device
        self._tensors: list[torch.Tensor] = []

    def keep(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """Passes the batches on, and keeps them."""
        for part, batch in zip(self._parts, batches, strict=True):
            tensors = batch if isinstance(batch, MixedTensor) else (batch,)
            if not self._tensors:
                self._tensors = list(map(self._scratch, tensors))
            for kept, given in zip(self._tensors, tensors, strict=True):
                kept[part] = given.cpu()
            yield batch

    def _scratch(self, batch: torch.Tensor) -> torch.Tensor:
        """Room for all batches."""
        return self._work.scratch((self._parts[-1].stop, *batch.shape[1:]), batch.dtype)

    def read(self) -> Iterator[Rows]:
        """The batches that were kept."""
        for part in self._parts:
            tensors = [kept[part].to(self._device) for kept in self._tensors]
            yield cast(Rows, MixedTensor(*tensors) if len(tensors) > 1 else tensors[0])


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W') x|| / ||W x|| over the calibration inputs x with E[x x^T] = `hessian`.

    Formula: sqrt(tr(D H D^T) / tr(W H W^T)), D = W - W'; 0 where W x is 0 everywhere. In the
    weights' dtype: float32 was within 2e-5 of float64 also where one direction of x had 10^8 times
    the others' variance.
    """

    hessian = hessian.to(weight.dtype)

    def power(matrix: torch.Tensor) -> torch.Tensor:
        parts = matrix.to(hessian.dtype).split(ERROR_ROWS)
        powers = [((rows @ hessian) * rows).sum(dtype=torch.float64) for rows in parts]
        return torch.stack(powers).sum()

    total = power(weight)
    return float((power(weight - rounded) / total).clamp_min(0).sqrt()) if total > 0 else 0.0


def _round_weight(
    shape: ModelShape, config: ResQConfig, name: str, weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[QuantizedWeight, torch.Tensor]:
    k_hi = shape.k_hi(name, config)
    if config.weights == "gptq":
        return gptq(weight, hessian, k_hi, config.damping)
    rounded = quantize_weight(weight, k_hi)
    return rounded, weight[:, rounded.k_lo :] / rounded.weight_scale[:, 1:]
