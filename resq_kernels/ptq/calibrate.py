"""Calibration: token windows, and the second moments of the float model on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from resq_kernels.architecture import ModelShape
from resq_kernels.ptq.decoder import DecoderLayer, Rope, product_dtype
from resq_kernels.ptq.gram import Gram, gram_per_head
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.token_weights import attention_weights, looked_at
from resq_kernels.ptq.workspace import HiddenStates, Workspace

BATCH_TOKENS = 2048
"""Tokens that run through a layer at once: bounds its activations, fixes the order of sums."""


@dataclass(frozen=True)
class SecondMoments:
    """Uncentred second moments E[x x^T] of the float model, float64.

    Attributes:
        hidden: [hidden, hidden]: normalised inputs of the linears that read the residual stream,
            mean over layers of the average of attention's, by default weighted by
            `attention_weights`, and the MLP's.
        values: [layers, kv_heads, head_dim, head_dim]: outputs of v_proj.
        attended: same shape: outputs of attention, mean over the query heads of a kv head.
        keys: same shape: keys after RoPE.
        queries: same shape: queries after RoPE, mean over the query heads of a kv head.
        intermediate: [layers, intermediate]: mean squares of down_proj's inputs before the Hadamard
            transform.
    """

    hidden: torch.Tensor
    values: torch.Tensor
    attended: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    intermediate: torch.Tensor


class Windows(NamedTuple):
    """Windows of a text, int64 [windows, seqlen], none of which overlap."""

    calibration: torch.Tensor
    held_out: torch.Tensor


def windows(
    tokenizer: Any,
    texts: str | Sequence[str],
    samples: int,
    seqlen: int,
    seed: int = 0,
    held_out: int = 0,
) -> Windows:
    """Cuts texts into windows of tokens and draws some of them.

    The tokens of all texts (no special tokens added) are concatenated and cut into windows from a
    random offset. `samples` windows are drawn without replacement, in random order, and after them
    those that are held out.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: one text or several.
        samples: number of windows; a short text gives fewer, with a warning.
        seqlen: tokens of a window.
        seed: seed of the draw.
        held_out: windows besides those, for a verdict; a short text gives fewer, or none.

    Returns:
        At most `samples` and at most `held_out` windows.

    Raises:
        ValueError: the texts do not fill one window.
    """
    texts = [texts] if isinstance(texts, str) else texts
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    available = len(ids) // seqlen
    if available == 0:
        raise ValueError(
            f"calibration text: expected at least {seqlen} tokens (one window), got {len(ids)}"
        )
    if available < samples:
        warnings.warn(
            f"calibration text: {len(ids)} tokens give {available} windows of {seqlen} instead "
            f"of {samples}",
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(len(ids) - available * seqlen + 1, (1,), generator=generator))
    cut = torch.tensor(ids[offset : offset + available * seqlen]).view(available, seqlen)
    order = torch.randperm(available, generator=generator)
    return Windows(cut[order[:samples]], cut[order[samples : samples + held_out]])


def check_tokens(windows: torch.Tensor, shape: ModelShape, name: str = "calibration") -> None:
    """Refuses token windows that the model cannot read.

    Raises:
        ValueError: not int64 [windows, seqlen], empty, or an id outside the vocabulary.
    """
    if windows.dtype != torch.int64 or windows.dim() != 2 or windows.numel() == 0:
        raise ValueError(
            f"{name}: expected token ids int64 [windows, seqlen], got "
            f"{str(windows.dtype).removeprefix('torch.')} {list(windows.shape)}"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= shape.vocab:
        raise ValueError(
            f"{name}: expected token ids from 0 to {shape.vocab - 1} (the model's "
            f"vocabulary), got {low if low < 0 else high}; is this the model's tokenizer?"
        )


def batches(windows_count: int, seqlen: int) -> Iterator[slice]:
    """Slices of windows of about `BATCH_TOKENS` tokens."""
    step = max(1, BATCH_TOKENS // seqlen)
    return (slice(i, min(i + step, windows_count)) for i in range(0, windows_count, step))


def layer_bar(layers: Iterable[int], stage: str, progress: bool) -> Iterable[int]:
    """A progress bar over layers, on stderr."""
    return tqdm(layers, desc=f"{stage:<9}", unit="layer", disable=not progress)


def float_states(
    work: Workspace, tokens: torch.Tensor, shape: ModelShape, layer: int
) -> HiddenStates:
    """The float model's hidden states of all windows before a layer, or after the last."""
    return work.hidden(f"float-{layer:05d}", (*tokens.shape, shape.hidden))


class Inputs(NamedTuple):
    """What the linears of a decoder layer read in one batch, float32, and what they make of it.

    Attributes:
        qkv, gate_up: [windows, seqlen, hidden].
        queries, keys: after RoPE, [windows, heads or kv_heads, seqlen, head_dim].
        values: [windows, kv_heads, seqlen, head_dim].
        attended: o_proj's, [windows, seqlen, heads * head_dim].
        down: [windows, seqlen, intermediate], before any Hadamard transform.
    """

    qkv: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


Measured = dict[str, torch.Tensor]


@torch.no_grad()
def measure_layers(
    model: SourceModel,
    tokens: torch.Tensor,
    rope: Rope,
    work: Workspace,
    piece: str,
    measure: Callable[[Iterable[Inputs]], Measured],
    keep: Callable[[int, Measured], None],
    *,
    fold_norms: bool,
    device: str,
    progress: bool,
    keep_states: bool,
) -> Measured:
    """Runs the float model layer by layer over the windows and measures the inputs of its linears.

    Its linears are computed in `product_dtype`, everything else in float32. Memory: one layer and
    `BATCH_TOKENS` tokens of activations; hidden states live in the work folder, in one piece per
    layer, so that a killed run can continue. With `keep_states` those after the last layer stay
    there (`float_states`).

    Args:
        model: the source.
        tokens: calibration windows, int64 [windows, seqlen].
        rope: tables of `rope_tables`.
        work: the work folder.
        piece: the finished pieces of the layers are called "piece-00000" and so on.
        measure: of the batches of one layer.
        keep: saves what was measured of a layer, the piece itself last.
        fold_norms: whether gains of norms are multiplied into the linears first.
        device: where the layers are computed.
        progress: bars on stderr.
        keep_states: as above.

    Returns:
        The pieces of all layers, stacked.
    """
    shape = model.shape
    names = [f"{piece}-{index:05d}" for index in range(shape.layers)]
    for index in layer_bar(range(shape.layers), "calibrate", progress):
        if work.has(names[index]):
            continue
        states = float_states(work, tokens, shape, index)
        if index == 0 and not states.exists:
            states.begin().copy_(model.embed(tokens))
            states.finish()
        after = float_states(work, tokens, shape, index + 1)
        layer = model.layer(index, fold_norms).to(device, product_dtype(model.dtype, device))
        decoder = DecoderLayer(shape, layer, rope)
        measured = measure(_inputs(decoder, states.read(), after.begin(), device))
        after.finish()
        keep(index, measured)
        states.delete()
    if not keep_states:
        float_states(work, tokens, shape, shape.layers).delete()
    pieces = [work.load(name) for name in names]
    return {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}


def check_finite(index: int, measured: Measured, what: str) -> None:
    """Refuses a layer on whose inputs nothing can be based.

    Raises:
        ValueError: names the layer, `what` was measured, and of what.
    """
    for name, tensor in measured.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"calibration: layer {index}: expected a finite {what} ({name}), got "
                "NaN or infinity; the model overflows on these tokens"
            )


def calibrate(
    model: SourceModel,
    tokens: torch.Tensor,
    rope: Rope,
    work: Workspace,
    device: str = "cpu",
    progress: bool = True,
    keep_states: bool = False,
    weighted: bool = True,
) -> SecondMoments:
    """Sums second moments of the float model over the windows (`measure_layers`, `Gram`).

    Norm gains are folded into the linears first, so the inputs are those of the model that is then
    rotated. Without `weighted` all tokens count alike.

    Raises:
        ValueError: a weight or a moment is not finite.
    """
    shape = model.shape

    def keep(index: int, moments: Measured) -> None:
        check_finite(index, moments, "second moment")
        # The largest moment is kept as a running sum: one file, for any number of layers.
        hidden = moments.pop("hidden")
        if index > 0:
            hidden += work.load(f"hidden-moment-{index - 1:05d}")["hidden"]
        work.save(f"hidden-moment-{index:05d}", {"hidden": hidden})
        work.save(f"moments-{index:05d}", moments)
        work.delete(f"hidden-moment-{index - 1:05d}")

    moments = measure_layers(
        model,
        tokens,
        rope,
        work,
        "moments",
        lambda batches: _moments(batches, shape, device, weighted),
        keep,
        fold_norms=True,
        device=device,
        progress=progress,
        keep_states=keep_states,
    )
    hidden = work.load(f"hidden-moment-{shape.layers - 1:05d}")["hidden"] / shape.layers
    return SecondMoments(hidden=hidden, **moments)


def _inputs(
    decoder: DecoderLayer, states: torch.Tensor, after: torch.Tensor, device: str
) -> Iterator[Inputs]:
    """Fills `after` with the layer's output, and gives what its linears read."""
    for part in batches(*states.shape[:2]):
        x = states[part].to(device)
        qkv = decoder.qkv_input(x)
        queries, keys, values = decoder.heads(qkv)
        attended = decoder.attend(queries, keys, values)
        between = decoder.after_attention(x, attended)
        gate_up = decoder.gate_up_input(between)
        down = decoder.down_input(gate_up)
        after[part] = decoder.output(between, down).cpu()
        yield Inputs(qkv, queries, keys, values, attended, gate_up, down)


def _moments(batches: Iterable[Inputs], shape: ModelShape, device: str, weighted: bool) -> Measured:
    """The moments of one layer."""
    hidden, tokens = Gram(shape.hidden, device), 0
    moments = _zero_moments(shape, device)
    for x in batches:
        weights = None
        if weighted:
            looked = looked_at(x.keys.shape[2], x.keys.device)
            weights = attention_weights(x.queries[:, :, looked], x.keys)
        hidden.add(x.qkv, weights)
        hidden.add(x.gate_up)
        attended = x.attended.unflatten(-1, (shape.heads, shape.head_dim)).transpose(1, 2)
        moments["values"] += gram_per_head(x.values, shape.kv_heads)
        moments["attended"] += gram_per_head(attended, shape.kv_heads)
        moments["keys"] += gram_per_head(x.keys, shape.kv_heads)
        moments["queries"] += gram_per_head(x.queries, shape.kv_heads)
        moments["intermediate"] += x.down.square().sum((0, 1))
        tokens += x.qkv.shape[:2].numel()
    moments = {name: m / tokens for name, m in moments.items()}
    return {"hidden": hidden.mean().cpu()} | {name: m.cpu() for name, m in moments.items()}


def _zero_moments(shape: ModelShape, device: str) -> dict[str, torch.Tensor]:
    head = (shape.kv_heads, shape.head_dim, shape.head_dim)
    sizes = {
        "values": head,
        "attended": head,
        "keys": head,
        "queries": head,
        "intermediate": (shape.intermediate,),
    }
    return {k: torch.zeros(v, dtype=torch.float64, device=device) for k, v in sizes.items()}
