"""A quantized model as the float model that it stands for, with its adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from resq_kernels import architecture
from resq_kernels.nn.embedding import TiedHead
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.linear_basis import LinearBasis, bases_of
from resq_kernels.nn.tensor_parallel import parallel_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@torch.no_grad()
def dequantize(model: nn.Module) -> PreTrainedModel:
    """The float model whose weights are those of a quantized model, in the float model's basis.

    Activations, keys and values are no longer rounded; what rounding did to the weights stays. To
    merge an adapter without that loss, merge it into the model that was quantized.

    Args:
        model: a quantized causal language model, or peft's model of one: active adapters on its
            linears are merged, W + s B A. It is not changed.

    Returns:
        A model of the same class in the same dtype, on the CPU, which `save_pretrained` writes as
        an ordinary folder. Its size is that of the float model.

    Raises:
        ValueError: another model, a rank of tensor parallel, or a folder of a format before 6.
    """
    wrapper: Any = model
    base: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: Any = getattr(base, "model", None)
    head = getattr(base, "lm_head", None)
    if "hidden_basis" not in vars(decoder or base) or head is None:
        raise ValueError(
            "dequantize: expected a quantized causal language model, got a "
            f"{type(base).__name__} that is not quantized or has no lm_head"
        )
    if (parallel := parallel_of(base)) is not None:
        raise ValueError(
            f"dequantize: expected all of a model, got a rank of tensor parallel {parallel.degree}"
        )
    hidden = decoder.hidden_basis
    embedding, norm = _weight(decoder.embed_tokens), decoder.norm.weight
    if hidden is not None:
        embedding, norm = hidden.restore(embedding), hidden.gain
    state = {architecture.EMBEDDING: embedding, architecture.FINAL_NORM: norm}
    if not (tied := isinstance(head, TiedHead)):
        state[architecture.HEAD] = _head(head, hidden)
    for name, basis in bases_of(decoder):
        owner, _, part = name.rpartition(".")
        linear = _part(decoder.get_submodule(owner), part)
        for kind, tensor in _float_linear(linear, basis):
            state[f"{architecture.DECODER_PREFIX}{name}.{kind}"] = tensor
    for index, layer in enumerate(decoder.layers):
        norms = {name: layer.get_submodule(name).weight for name in architecture.NORMS}
        if hidden is not None:
            norms = dict(zip(norms, hidden.linears.norm_gains[index], strict=True))
        for name in architecture.HEAD_NORMS.values() if layer.self_attn.q_norm is not None else ():
            norms[name] = layer.get_submodule(name).weight
        for name, gain in norms.items():
            state[f"{architecture.layer_prefix(index)}{name}.weight"] = gain
    config = copy.deepcopy(base.config)
    del config.quantization_config
    config._attn_implementation, config.tie_word_embeddings = "sdpa", tied
    dtype = decoder.norm.weight.dtype
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
    found: PreTrainedModel = type(base).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    found.generation_config = copy.deepcopy(base.generation_config)
    return found


def _part(owner: Any, name: str) -> Any:
    """A linear of an attention or MLP, fused or not."""
    fused = owner.fused
    return fused.split()[name] if fused is not None and name in fused.rows else getattr(owner, name)


def _float_linear(linear: Any, basis: LinearBasis | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight and bias of a linear, with or without adapters, in the float model's basis."""
    own = _own(linear)
    weight, bias = _weight(own), own.bias
    if basis is not None:
        weight = basis.float_rows(basis.float_columns(weight))
        bias = None if bias is None else basis.float_rows(bias.float())
    for adapter in _adapters(linear):
        weight = weight + linear.get_delta_weight(adapter)
        if (update := linear.lora_B[adapter].bias) is not None:
            if bias is None:
                raise ValueError(
                    f"dequantize: {adapter}: lora_bias: expected linears with a bias, got one "
                    "without: the float model has no place for it"
                )
            bias = bias + linear.scaling[adapter] * update
    yield "weight", weight
    if bias is not None:
        yield "bias", bias


def _head(head: Any, hidden: Any) -> torch.Tensor:
    """The float model's head, of one that is not tied."""
    weight = _weight(_own(head))
    if hidden is not None:
        weight = torch.where(hidden.gain == 0, 0, hidden.restore(weight) / hidden.gain)
    return sum((head.get_delta_weight(adapter) for adapter in _adapters(head)), weight)


def _weight(module: Any) -> torch.Tensor:
    """float32 [N, K] as it is stored."""
    weight: torch.Tensor = (
        module.dequantize() if isinstance(module, ResQLinear) else module.weight.float()
    )
    return weight


def _own(linear: Any) -> Any:
    """A linear without its adapters."""
    return linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear


def _adapters(linear: Any) -> list[str]:
    """The adapters of a linear that have an effect."""
    if not hasattr(linear, "get_base_layer") or linear.disable_adapters:
        return []
    return [name for name in linear.active_adapters if name in linear.lora_A]
