"""The rotated model computes the same function as the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from resq_kernels import architecture, hadamard
from resq_kernels.architecture import DOWN_PROJ, layer_prefix
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.amplitudes import measure_amplitudes, permutations
from resq_kernels.ptq.basis import find_basis
from resq_kernels.ptq.calibrate import calibrate
from resq_kernels.ptq.decoder import DecoderLayer, rope_tables
from resq_kernels.ptq.embedding import embedding_tensors, head_tensors
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.rotate import Rotation, rotate
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace

CONFIGS = {
    "resq": ResQConfig(),
    "resq-quarter": ResQConfig(high_fraction=0.25),
    "resq-whole-rows": ResQConfig(hadamard_block=0),
    "quarot": ResQConfig(method="quarot"),
    "quik": ResQConfig(method="quik"),
}


def rotation_of(
    model: SourceModel, tokens: torch.Tensor, config: ResQConfig, folder: Path
) -> Rotation:
    basis = None
    rope = rope_tables(model.reader.config, model.reader.folder, tokens.shape[1])
    if config.method == "quik":
        return permutations(
            measure_amplitudes(model, tokens, rope, Workspace(folder), progress=False), model.shape
        )
    if config.method == "resq":
        moments = calibrate(model, tokens, rope, Workspace(folder), progress=False)
        basis = find_basis(model, moments)
    return rotate(basis, model.shape, config)


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(tokens).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def fuse_embedding(model: SourceModel, rotation: Rotation | None) -> torch.Tensor:
    (tensor,) = embedding_tensors(model, rotation, ResQConfig(embedding_bits=16)).values()
    return tensor


def fuse_head(model: SourceModel, rotation: Rotation | None) -> torch.Tensor:
    (tensor,) = head_tensors(model, rotation, ResQConfig(embedding_bits=16)).values()
    return tensor


def exact_rows(
    model: SourceModel, name: str, rotation: Rotation, gain: torch.Tensor | None = None
) -> torch.Tensor:
    rows = model.load(name).double()
    return (rows if gain is None else rows * gain.double()) @ rotation.hidden


def fused_transformers_model(
    folder: Path, model: SourceModel, rotation: Rotation, config: ResQConfig
) -> torch.nn.Module:
    """The source's class with the fused weights; hooks do what the kernels do between linears.

    Keys and queries stay unrotated: an orthogonal matrix on both leaves attention as it is.
    """
    fused = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, tie_word_embeddings=False
    )
    embedding = exact_rows(model, architecture.EMBEDDING, rotation)
    head = exact_rows(model, model.head, rotation, model.load(architecture.FINAL_NORM))
    for exact, stored in (
        (embedding, fuse_embedding(model, rotation)),
        (head, fuse_head(model, rotation)),
    ):
        assert stored.dtype == model.reader.info(model.head).dtype
        assert torch.equal(stored, exact.to(stored.dtype))
    state = {
        architecture.EMBEDDING: embedding,
        architecture.HEAD: head,
        architecture.FINAL_NORM: torch.ones(model.shape.hidden),
    }
    for index in range(model.shape.layers):
        layer = fuse_layer(model, index, rotation, config)
        prefix = layer_prefix(index)
        state |= {f"{prefix}{name}.weight": w for name, w in layer.weights.items()}
        state |= {f"{prefix}{name}.bias": b for name, b in layer.biases.items()}
        for name, width in model.shape.norms.items():
            state[f"{prefix}{name}.weight"] = layer.norms.get(name, torch.ones(width))
        block = fused.model.layers[index]
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, order=layer.o_order: (args[0][..., order],)
        )
        if not config.rotates:
            continue
        kinds = (model.shape.k_hi(DOWN_PROJ, config), model.shape.hadamard_block(config))
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, kinds=kinds: (hadamard.transform_low(args[0], *kinds),)
        )
    fused.load_state_dict(state)
    return fused


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_weights_give_the_same_logits(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    model, config = SourceModel(any_model), CONFIGS[name]
    rotation = rotation_of(model, tokens, config, tmp_path)
    fused = fused_transformers_model(any_model, model, rotation, config)
    expected = reference_logits(any_model, tokens)
    # Weights are rounded to float32 once, 2^-24 relative each.
    tolerance = 8 * 2.0**-24
    with torch.no_grad():
        assert relative(fused(tokens).logits, expected) < tolerance
        # A rotation that misses one layer's values by a permutation is noticed.
        value = fused.model.layers[0].self_attn.v_proj.weight
        value[:2] = value[:2].flip(0)
        assert relative(fused(tokens).logits, expected) > 4 * tolerance


def run_layers(
    model: SourceModel, tokens: torch.Tensor, rotation: Rotation | None, config: ResQConfig
) -> torch.Tensor:
    """Logits through DecoderLayer, nothing rounded."""
    rope = rope_tables(model.reader.config, model.reader.folder, tokens.shape[1])
    x = fuse_embedding(model, rotation)[tokens].float()
    for index in range(model.shape.layers):
        layer = fuse_layer(model, index, rotation, config)
        x = DecoderLayer(model.shape, layer, rope).forward(x)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.shape.norm_eps)
    if rotation is None:
        x = x * model.load(architecture.FINAL_NORM)
    return x @ fuse_head(model, rotation).float().T


def test_decoder_layers_compute_the_source_model(any_model: Path, tokens: torch.Tensor) -> None:
    logits = run_layers(SourceModel(any_model), tokens, None, ResQConfig(method="rtn"))
    assert relative(logits, reference_logits(any_model, tokens)) < 1e-5


@pytest.mark.parametrize("name", ["resq", "quik"])
def test_decoder_layers_compute_the_rotated_model(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    model, config = SourceModel(any_model), CONFIGS[name]
    rotation = rotation_of(model, tokens, config, tmp_path)
    logits = run_layers(model, tokens, rotation, config)
    # Key rotations are stored in float16: R R^T = I to 2^-11, which scores feel.
    bits = 9 if model.reader.info(architecture.EMBEDDING).dtype == torch.bfloat16 else 11
    assert relative(logits, reference_logits(any_model, tokens)) < 8 * 2.0**-bits


@pytest.mark.parametrize("name", CONFIGS)
def test_rotations_are_undone_by_their_inverses(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    model = SourceModel(llama)
    rotation = rotation_of(model, tokens, CONFIGS[name], tmp_path)
    for matrix, inverse, tolerance in (
        (rotation.hidden, rotation.hidden.mT, 1e-12),
        (rotation.values, rotation.values_inverse, 1e-11),
        (rotation.keys.double(), rotation.keys.double().mT, 2.0**-10),
    ):
        eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
        assert (matrix @ inverse - eye).abs().max() < tolerance
    other = rotate(None, model.shape, ResQConfig(method="quarot", seed=1))
    same = rotate(None, model.shape, ResQConfig(method="quarot", seed=1))
    assert torch.equal(other.hidden, same.hidden) and not torch.equal(other.hidden, rotation.hidden)


def test_o_proj_columns_are_low_then_high_per_head() -> None:
    from resq_kernels.ptq.fuse import o_column_order

    shape = architecture.ModelShape("llama", 8, 8, 8, 1, 2, 1, 8, 1e-5, (), False)
    order = o_column_order(shape, 0.25).tolist()
    assert order == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 6, 7, 14, 15]
