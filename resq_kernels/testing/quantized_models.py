"""Small quantized models with random codes, for tests of everything after `resq quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from resq_kernels import architecture, checkpoint
from resq_kernels.config import ResQConfig
from resq_kernels.integrations.transformers import ResQQuantizationConfig, ResQQuantizer, prepare
from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.convert import pack
from resq_kernels.nn.embedding import ResQEmbedding, TiedHead
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.nn.linear_basis import LinearBases
from resq_kernels.safetensors_io import (
    SINGLE_FILE,
    read_json,
    save_tensors,
    tensors_hash,
    write_json,
)
from resq_kernels.testing.tiny_models import make_model

# Standard deviation of codes drawn uniformly from all 16, and from all 256.
_CODE_DEVIATION = torch.tensor([4.61, 73.9])


def random_quantized(
    model_type: str = "llama", options: ResQConfig | None = None, *, seed: int = 0, **sizes: Any
) -> Any:
    """A tiny model as `from_pretrained` would return it, quantized by `randomize`.

    Args:
        model_type: one of `architecture.SUPPORTED`.
        options: how it is quantized; default `ResQConfig()`.
        seed: seed of all values.
        sizes: fields of the transformers configuration, as in `tiny_models.make_model`.
    """
    model = make_model(model_type, seed=seed, **sizes)
    randomize(model, options or ResQConfig(), seed)
    return model


@torch.no_grad()
def randomize(model: Any, options: ResQConfig, seed: int = 0) -> None:
    """Turns a float model into a quantized one, in place, with random codes, scales, biases, gains
    and rotations.

    Everything is random, so that a path that forgets a scale, a bias, a gain or a rotation gives
    other numbers.

    Args:
        model: a float model of transformers of a supported type, on any device.
        options: how it is quantized.
        seed: seed of all values.
    """
    tied_head = model.config.tie_word_embeddings and options.embedding_bits == 8
    if model.config.tie_word_embeddings:  # as `resq quantize` leaves it
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), False)
    prepare(model, checkpoint.StoredFormat(options, tied_head))
    torch.manual_seed(seed)
    rotations = []
    for module in model.modules():
        if isinstance(module, ResQLinear):
            codes_lo, codes_hi, _ = module.codes()
            codes_lo.random_(0, 256)
            codes_hi.random_(-128, 128)
            spread = 0.5 + torch.rand(module.out_features, 2)
            # A linear returns numbers as large as its input, an embedding numbers around 1.
            terms = 1 if isinstance(module, ResQEmbedding) else module.in_features
            module.weight_scale.copy_(spread * terms**-0.5 / _CODE_DEVIATION)
            if module.bias is not None:
                module.bias.normal_(std=0.3)
        elif isinstance(module, ResQAttention) and module.key_rotation is not None:
            module.key_rotation.copy_(_orthogonal(module.head_dim))
            rotations.append(module.key_rotation)
        elif isinstance(module, TiedHead) and module.gain is not None:
            turn = _orthogonal(len(module.gain))
            module.gain.copy_(turn.T @ ((0.5 + torch.rand(len(turn), 1)) * turn))
    for layer in model.model.layers:
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += filter(None, (layer.self_attn.q_norm, layer.self_attn.k_norm))
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
    basis = model.model.hidden_basis
    if basis is not None:
        basis.rotation.copy_(_orthogonal(len(basis.rotation)))
        basis.gain.uniform_(0.5, 1.5)
        rotations.append(basis.rotation)
        _randomize_bases(basis.linears, layer.self_attn.q_norm is not None)
    pack(model)
    hashes = tensors_hash(()), tensors_hash(rotations)
    entry = checkpoint.quantization_config(options, *hashes, tied_head)
    model.config.quantization_config = ResQQuantizationConfig(**entry)
    model.hf_quantizer = ResQQuantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized = True


def _randomize_bases(linears: LinearBases, has_head_norms: bool) -> None:
    linears.norm_gains.uniform_(0.5, 1.5)
    if not has_head_norms:  # a norm undoes them
        linears.key_factors.uniform_(0.5, 1.5)
    linears.intermediate_factors.uniform_(0.5, 1.5)
    for index in range(len(linears.values)):
        for matrix in linears.values[index]:
            matrix.copy_(_orthogonal(len(matrix)) * (0.5 + torch.rand(len(matrix))))
        linears.intermediate_order[index] = torch.randperm(linears.intermediate_order.shape[1])


def _orthogonal(size: int) -> torch.Tensor:
    """A random orthogonal matrix [size, size]."""
    return torch.linalg.qr(torch.randn(size, size))[0]


@torch.no_grad()
def head_input(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The last hidden states [B, L, K] of a pass as the head gets them, which have the same bits
    however a prompt is cut; a caller's are turned by a float product, whose bits depend on L."""
    found: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda _, args, states: found.append(states))
    try:
        model(ids, logits_to_keep=1, **arguments)
    finally:
        hook.remove()
    return found[0]


def make_older(folder: Path, version: int) -> None:
    """Rewrites a quantized folder of one file in an older format.

    Before 6 there were no bases of linears; before 5 no `hadamard_block`, so the model must have
    been made with 0; before 3 no basis and no guard.
    """
    content = read_json(folder / "config.json")
    if version < 5:
        block = content["quantization_config"].pop("hadamard_block")
        assert not block, "a format of whole rows"
    tensors = load_file(folder / SINGLE_FILE)
    missing = [name for name in tensors if name.startswith(architecture.BASIS_LINEARS)]
    if version < 3:
        missing += [architecture.GUARD, architecture.BASIS_ROTATION, architecture.BASIS_GAIN]
    for name in missing:
        tensors.pop(name, None)
    save_tensors(folder / SINGLE_FILE, tensors)
    layers = range(content["num_hidden_layers"])
    keys = [architecture.layer_prefix(layer) + architecture.KEY_ROTATION for layer in layers]
    keys += [architecture.BASIS_ROTATION]
    content["quantization_config"] |= {
        "format_version": version,
        "rotation_hash": tensors_hash(tensors[key] for key in keys if key in tensors),
    }
    write_json(folder / "config.json", content)
