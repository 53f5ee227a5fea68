"""Plant outlier channels in a Llama or Qwen2 model without changing what it computes.

Large language models have a few channels whose activations are tens of times larger than the
rest, and those channels are what makes 4-bit activations hard. Small models trained for an hour
hardly have them. The edits below create them in any model by symmetries of the architecture: each
replaces the weights by others that give the same logits up to rounding.

Notation: ``x`` is the residual stream (a row), ``d`` its width, ``n(x) = x / rms(x)``, ``g`` a
norm's gain, ``W`` a linear layer's matrix with shape (outputs, inputs), so that it computes
``x W^T + b``; ``s > 0`` is a factor.

(a) *Untied embedding.* The output matrix becomes a copy of the embedding, so that the two can be
    edited apart. Same values, same function.

(b) *Massive residual channels.* Every norm's gain is folded into the layers behind it, which gives
    ``n(x) diag(g) W^T = n(x) (W diag(g))^T`` with a gain of one. Then for an orthogonal ``Q`` the
    stream is replaced by ``x Q``: embedding ``E -> E Q``; layers that write to the stream (o_proj,
    down_proj) ``W -> Q^T W`` and ``b -> b Q``; layers that read from it (q, k, v, gate, up,
    lm_head) ``W -> W Q``. As ``rms(x Q) = rms(x)``, the readers see ``n(x Q) (W Q)^T =
    n(x) Q Q^T W^T = n(x) W^T``. ``Q`` puts the leading eigenvectors of the stream's second moment
    ``mean(n(x)^T n(x))`` on ``k`` chosen axes, so these carry the largest energy ``k`` directions
    can carry; the other axes stay as near to where they were as orthogonality allows. Orthogonal
    changes of basis are all that an RMS norm leaves free, so the model's own spectrum limits how
    far these channels stand out.

(c) *Norm gains.* ``g_c -> s g_c`` for chosen channels ``c`` and column ``c`` of each reader of that
    norm divided by ``s``: the product ``(s g_c n_c) (W_oc / s)`` is unchanged. The input of the
    readers has outlier channels. (Methods that fold the gains into the weights undo this edit
    exactly; those that quantize behind the norm as it is have to cope with it.)

(d) *Values.* Row ``r`` of v_proj (with its bias) is multiplied by ``s``. Attention mixes values
    over tokens, never over channels, so the output of each query head of that group has the
    channel multiplied by ``s``, and the matching column of o_proj is divided by ``s``.

(e) *Keys.* Rotary embedding turns the pair of channels ``(i, i + head_dim / 2)`` by an angle that
    depends on the position; a common factor of the pair commutes with the turn. Both k_proj rows
    (with bias) are multiplied by ``s``, both q_proj rows of each query head of the group are
    divided by ``s``, and the score ``q k^T`` keeps each of its terms.

(f) *MLP.* ``down(silu(gate(x)) * up(x))`` is linear in ``up``: row ``r`` of up_proj (with bias) is
    multiplied by ``s`` and column ``r`` of down_proj divided by ``s``.

Factors are powers of two by default: then (c) to (f) change exponents only, and a model stored in
bfloat16 loses nothing (float16 may underflow). Edit (b) rounds the matrices it turns.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class OutlierStrengths:
    """How many outliers of each kind are planted and how strong they are.

    A count of zero or a factor of one leaves that kind out.

    Args:
        massive_channels: axes of the residual stream that get its leading eigenvectors.
        norm_channels: channels of every layer norm with a larger gain, the same in all layers.
        norm_factor: factor of these gains.
        value_channels: channels per key-value head and layer with larger values.
        value_factor: factor of these values.
        key_pairs: rotary pairs per key-value head and layer with larger keys.
        key_factor: factor of these keys.
        mlp_channels: inner channels per layer with larger activations.
        mlp_factor: factor of these activations.
        powers_of_two: round every factor to the nearest power of two.
    """

    massive_channels: int = 4
    norm_channels: int = 4
    norm_factor: float = 16.0
    value_channels: int = 2
    value_factor: float = 8.0
    key_pairs: int = 2
    key_factor: float = 8.0
    mlp_channels: int = 8
    mlp_factor: float = 4.0
    powers_of_two: bool = True

    def factor(self, value: float) -> float:
        """Return a factor as it is applied.

        Args:
            value: requested factor.

        Returns:
            ``2 ** round(log2(value))`` when ``powers_of_two`` is set, else ``value``.
        """
        if not value > 0 or math.isinf(value):
            raise ValueError(f"a factor must be positive and finite, got {value}")
        return 2.0 ** round(math.log2(value)) if self.powers_of_two else float(value)


def _check_architecture(model: PreTrainedModel) -> None:
    """Refuse models whose layers the edits would not preserve."""
    config = model.config
    if config.model_type not in ("llama", "qwen2"):
        raise ValueError(f"only llama and qwen2 are supported, not {config.model_type!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported")


def _head_dim(model: PreTrainedModel) -> int:
    """Return the width of an attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _norms_and_readers(model: PreTrainedModel) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """List the norms inside the layers, each with the linear layers that read its output."""
    found: list[tuple[nn.Module, list[nn.Linear]]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        found.append((layer.input_layernorm, readers))
        found.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return found


def _scale_rows(linear: nn.Linear, rows: torch.Tensor, factor: float) -> None:
    """Multiply outputs of a linear layer, its bias included, in place."""
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor


def _scale_columns(linear: nn.Linear, columns: torch.Tensor, factor: float) -> None:
    """Multiply the weights of inputs of a linear layer in place."""
    linear.weight[:, columns] *= factor


def untie_embedding(model: PreTrainedModel) -> None:
    """Give the output layer its own copy of the embedding, edit (a).

    Args:
        model: model to edit in place; nothing happens when it is untied already.
    """
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    # The library keeps the list of tied weights on the model as well and drops them when saving.
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {}


@torch.no_grad()
def fold_norms(model: PreTrainedModel) -> None:
    """Move every norm's gain into the layers behind it, the first half of edit (b).

    Formula: ``W -> W diag(g)``, then ``g -> 1``.

    Args:
        model: untied model to edit in place.
    """
    for norm, readers in [*_norms_and_readers(model), (model.model.norm, [model.lm_head])]:
        for linear in readers:
            linear.weight.copy_((linear.weight.double() * norm.weight.double()).to(linear.weight))
        norm.weight.fill_(1.0)


@torch.no_grad()
def residual_moment(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Measure the second moment of the normalised residual stream.

    Formula: ``M = mean(n(x)^T n(x))`` over tokens and over the inputs of all norms.

    Args:
        model: any supported model.
        input_ids: calibration token ids of shape (batch, length).

    Returns:
        Symmetric float64 matrix of shape (d, d) with trace ``d``.
    """
    width = model.config.hidden_size
    total = torch.zeros(width, width, dtype=torch.float64)
    count = 0

    def gather(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        rows = inputs[0].detach().reshape(-1, width).double().cpu()
        rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        total.add_(rows.T @ rows)
        count += rows.shape[0]

    norms = [norm for norm, _ in _norms_and_readers(model)] + [model.model.norm]
    handles = [norm.register_forward_pre_hook(gather) for norm in norms]
    try:
        for batch in input_ids.split(4):
            model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return total / count


def concentrating_basis(moment: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Build the orthogonal matrix that puts leading eigenvectors on given axes.

    Formula: with ``V`` the leading ``k`` eigenvectors, ``Q[:, channels] = V``; the other columns
    are the polar factor of ``(I - V V^T) I[:, others]``, the orthonormal set in the complement of
    ``V`` nearest to the axes it replaces.

    Args:
        moment: symmetric matrix of shape (d, d).
        channels: ``k`` distinct channel indices; the first gets the largest eigenvalue.

    Returns:
        Orthogonal float64 matrix ``Q`` of shape (d, d).
    """
    width = moment.shape[0]
    leading = torch.linalg.eigh(moment.double()).eigenvectors.flip(1)[:, : channels.numel()]
    others = torch.ones(width, dtype=torch.bool)
    others[channels] = False
    axes = torch.eye(width, dtype=torch.float64)[:, others]
    left, _, right = torch.linalg.svd(axes - leading @ (leading.T @ axes), full_matrices=False)
    basis = torch.empty(width, width, dtype=torch.float64)
    basis[:, channels] = leading
    basis[:, others] = left @ right
    return basis


@torch.no_grad()
def change_basis(model: PreTrainedModel, basis: torch.Tensor) -> None:
    """Turn the residual stream by an orthogonal matrix, the second half of edit (b).

    Args:
        model: untied model whose norms have unit gain; edited in place.
        basis: orthogonal matrix ``Q`` of shape (d, d); the stream becomes ``x Q``.
    """

    def turn(parameter: nn.Parameter, product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        parameter.copy_(product(parameter.double()).to(parameter))

    basis = basis.to(device=model.lm_head.weight.device, dtype=torch.float64)
    turn(model.get_input_embeddings().weight, lambda weight: weight @ basis)
    turn(model.lm_head.weight, lambda weight: weight @ basis)
    for _, readers in _norms_and_readers(model):
        for linear in readers:
            turn(linear.weight, lambda weight: weight @ basis)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            turn(linear.weight, lambda weight: basis.T @ weight)
            if linear.bias is not None:
                turn(linear.bias, lambda bias: bias @ basis)


def _draw(generator: torch.Generator, total: int, count: int) -> torch.Tensor:
    """Draw distinct indices below ``total``."""
    if count > total:
        raise ValueError(f"cannot choose {count} of {total} channels")
    return torch.randperm(total, generator=generator)[:count]


def _plant_attention(
    model: PreTrainedModel, strengths: OutlierStrengths, generator: torch.Generator
) -> None:
    """Apply edits (d) and (e) to every layer."""
    head_dim = _head_dim(model)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    group = heads // kv_heads
    value_factor = strengths.factor(strengths.value_factor)
    key_factor = strengths.factor(strengths.key_factor)
    for layer in model.model.layers:
        attention = layer.self_attn
        for kv_head in range(kv_heads):
            # Query heads of a group are consecutive: head h reads key-value head h // group.
            queries = torch.arange(kv_head * group, (kv_head + 1) * group)[:, None] * head_dim
            dims = _draw(generator, head_dim, strengths.value_channels)
            _scale_rows(attention.v_proj, kv_head * head_dim + dims, value_factor)
            _scale_columns(attention.o_proj, (queries + dims).flatten(), 1.0 / value_factor)
            pairs = _draw(generator, head_dim // 2, strengths.key_pairs)
            dims = torch.cat([pairs, pairs + head_dim // 2])
            _scale_rows(attention.k_proj, kv_head * head_dim + dims, key_factor)
            _scale_rows(attention.q_proj, (queries + dims).flatten(), 1.0 / key_factor)


@torch.no_grad()
def plant_outliers(
    model: PreTrainedModel,
    calibration_ids: torch.Tensor | None = None,
    strengths: OutlierStrengths | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Edit a model into the same function with outlier channels, edits (a) to (f).

    Args:
        model: Llama or Qwen2 model with any number of key-value heads, with or without biases;
            edited in place. Edit (b) is most exact in float32.
        calibration_ids: token ids of shape (batch, length) for the directions of edit (b);
            without them that edit is left out.
        strengths: counts and factors, the defaults when None.
        seed: seed of the choice of channels.

    Returns:
        The same model object, untied. Its float32 logits differ from the original's by rounding,
        below ``1e-4`` of their largest value.
    """
    _check_architecture(model)
    strengths = strengths or OutlierStrengths()
    generator = torch.Generator().manual_seed(seed)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    untie_embedding(model)
    massive = _draw(generator, width, strengths.massive_channels)
    if calibration_ids is not None and massive.numel():
        moment = residual_moment(model, calibration_ids)
        fold_norms(model)
        change_basis(model, concentrating_basis(moment, massive))
    channels = _draw(generator, width, strengths.norm_channels)
    norm_factor = strengths.factor(strengths.norm_factor)
    for norm, readers in _norms_and_readers(model):
        norm.weight[channels] *= norm_factor
        for linear in readers:
            _scale_columns(linear, channels, 1.0 / norm_factor)
    _plant_attention(model, strengths, generator)
    mlp_factor = strengths.factor(strengths.mlp_factor)
    for layer in model.model.layers:
        rows = _draw(generator, inner, strengths.mlp_channels)
        _scale_rows(layer.mlp.up_proj, rows, mlp_factor)
        _scale_columns(layer.mlp.down_proj, rows, 1.0 / mlp_factor)
    return model


def channel_ratio(activations: torch.Tensor) -> float:
    """Measure how far the largest channel stands out.

    Formula: ``max_c a_c / median_c a_c`` with ``a_c`` the largest magnitude of channel ``c``.

    Args:
        activations: values of shape (..., channels).

    Returns:
        The ratio.
    """
    peaks = activations.detach().float().abs().flatten(0, -2).amax(dim=0)
    return (peaks.max() / peaks.median().clamp_min(1e-30)).item()


@torch.no_grad()
def outlier_report(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, float]:
    """Measure the outliers of a model at the places that get quantized.

    Args:
        model: any supported model.
        input_ids: token ids of shape (batch, length).

    Returns:
        The largest :func:`channel_ratio` over the layers of the residual stream (``residual``),
        the inputs of the attention and MLP layers (``attention_input``, ``mlp_input``), the keys
        before rotation (``keys``), the values (``values``) and the input of down_proj
        (``down_input``).
    """
    result: dict[str, float] = {}

    def note(name: str, activations: torch.Tensor) -> None:
        result[name] = max(result.get(name, 0.0), channel_ratio(activations))

    def on_input(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: note(name, inputs[0])

    def on_output(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        return lambda _module, _inputs, output: note(name, output)

    handles = []
    for layer in model.model.layers:
        for module, name in (
            (layer.input_layernorm, "residual"),
            (layer.post_attention_layernorm, "residual"),
            (layer.self_attn.q_proj, "attention_input"),
            (layer.mlp.gate_proj, "mlp_input"),
            (layer.mlp.down_proj, "down_input"),
        ):
            handles.append(module.register_forward_pre_hook(on_input(name)))
        for module, name in ((layer.self_attn.k_proj, "keys"), (layer.self_attn.v_proj, "values")):
            handles.append(module.register_forward_hook(on_output(name)))
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return result


def save_folder(out: Path, model: PreTrainedModel, tokenizer: object) -> None:
    """Write a Hugging Face folder, each file moved into place when complete.

    Args:
        out: destination folder, made when missing.
        model: model to store in its own dtype.
        tokenizer: its tokenizer.
    """
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            path.chmod(0o644)  # the weights are written with private permissions
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Write a planted copy of a model and report what changed.

    Args:
        argv: command-line arguments; those of the process when None.
    """
    defaults = OutlierStrengths()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    for name, value in vars(defaults).items():
        if name != "powers_of_two":
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, type=type(value), default=value)
    args = parser.parse_args(argv)

    from stdlib_corpus import calibration_text

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = calibration_text(8 * max(args.calibration_tokens, 256))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = ids[: min(args.calibration_tokens, ids.numel()) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        before = outlier_report(model, ids[:8])
        expected = model(input_ids=ids[:4], use_cache=False).logits
        strengths = OutlierStrengths(
            **{name: getattr(args, name) for name in vars(defaults) if name != "powers_of_two"}
        )
        plant_outliers(model, ids, strengths, args.seed)
        actual = model(input_ids=ids[:4], use_cache=False).logits
        after = outlier_report(model, ids[:8])
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"largest change of a logit: {error:.2e} of the largest logit")
    print("largest channel over median channel:")
    for name in before:
        print(f"  {name:16s}{before[name]:9.1f} -> {after[name]:9.1f}")
    save_folder(args.out, model.to(getattr(torch, args.dtype)), tokenizer)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
