"""The bases in a checkpoint are those that the quantizer multiplies into the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resq_kernels import architecture, checkpoint
from resq_kernels.architecture import DOWN_PROJ, LINEARS, NORMS, O_PROJ, layer_prefix
from resq_kernels.config import ResQConfig
from resq_kernels.nn.hidden_basis import HiddenBasis
from resq_kernels.nn.linear_basis import LinearBases, LinearBasis
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.rotate import Rotation, random_orthogonal
from resq_kernels.ptq.save import linear_bases
from resq_kernels.ptq.source import SourceModel

# Weights are float64 until `fuse_layer` and we round them to float32 once each.
ROUNDING = 2**-23


def uneven_rotation(model: SourceModel) -> Rotation:
    """A rotation in which nothing is the identity; its numbers survive being stored."""
    shape, generator = model.shape, torch.Generator().manual_seed(0)

    def factors(*sizes: int) -> torch.Tensor:
        return (0.5 + torch.rand(sizes, generator=generator)).double()

    heads = (shape.layers, shape.kv_heads)
    mixed = torch.randn(*heads, shape.head_dim, shape.head_dim, generator=generator)
    values = (mixed * 0.1 + torch.eye(shape.head_dim)).double()
    orders = [torch.randperm(shape.intermediate, generator=generator) for _ in range(shape.layers)]
    return Rotation(
        hidden=random_orthogonal(shape.hidden, generator).half().double(),
        values=values,
        values_inverse=torch.linalg.inv(values),
        keys=torch.eye(shape.head_dim).repeat(shape.layers, 1, 1).half(),
        key_factors=factors(*heads, shape.head_dim // 2),
        intermediate_factors=factors(shape.layers, shape.intermediate),
        intermediate_order=torch.stack(orders),
    )


def stored_bases(model: SourceModel, rotation: Rotation) -> HiddenBasis:
    """What a checkpoint of this rotation holds, as a model has it."""
    basis = HiddenBasis(model.shape.hidden)
    basis.rotation.data = rotation.hidden.half()
    basis.linears = LinearBases(model.shape)
    for name, tensor in linear_bases(model, rotation).items():
        parameter = basis.linears.get_parameter(name.removeprefix(f"{architecture.BASIS_LINEARS}."))
        assert (parameter.shape, parameter.dtype) == (tensor.shape, tensor.dtype)
        parameter.data = tensor
    return basis


def linear_basis(
    name: str, model: SourceModel, config: ResQConfig, basis: HiddenBasis
) -> LinearBasis:
    shape = model.shape
    k_hi = shape.k_hi(name, config) if name in (O_PROJ, DOWN_PROJ) else 0
    block = shape.hadamard_block(config)
    return LinearBasis(name, 1, basis, shape.heads, k_hi, config.rotates, block)


CONFIGS = {
    "blocks": ResQConfig(),
    "whole rows": ResQConfig(method="quarot", weights="rtn"),
    "no transform": ResQConfig(method="quik", weights="rtn"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_turn_as_the_quantizer_turns_them(any_model: Path, kind: str) -> None:
    model, config = SourceModel(any_model), CONFIGS[kind]
    rotation = uneven_rotation(model)
    basis = stored_bases(model, rotation)
    fused = fuse_layer(model, 1, rotation, config)
    prefix = layer_prefix(1)
    for name in LINEARS:
        own = linear_basis(name, model, config, basis)
        weight = model.load(f"{prefix}{name}.weight").double()
        expected, got = fused.weights[name].double(), own.rows(own.columns(weight))
        error = (got - expected).norm() / expected.norm()
        assert error < ROUNDING, name
        assert (own.columns(weight) - expected).norm() > 0.1 * expected.norm()  # rows count, too
        back = own.float_columns(own.float_rows(got))
        # U_A in float16 is orthogonal up to its rounding.
        assert (back - weight).norm() < 2e-3 * weight.norm(), name
        if name in fused.biases:
            bias = own.rows(model.load(f"{prefix}{name}.bias").double())
            torch.testing.assert_close(bias, fused.biases[name].double(), rtol=1e-5, atol=1e-6)


def test_gains_are_stored_before_they_are_folded(llama: Path) -> None:
    model = SourceModel(llama)
    basis = stored_bases(model, uneven_rotation(model))
    for index in range(model.shape.layers):
        for place, norm in enumerate(NORMS):
            gain = model.load(f"{layer_prefix(index)}{norm}.weight")
            assert torch.equal(basis.linears.norm_gains[index, place], gain)


def test_a_gain_of_zero_erases_its_column_both_ways(llama: Path) -> None:
    model = SourceModel(llama)
    basis = stored_bases(model, uneven_rotation(model))
    basis.linears.norm_gains.data[1, 0, 5] = 0
    own = linear_basis("self_attn.q_proj", model, ResQConfig(), basis)
    weight = torch.randn(256, 128)
    back = own.float_columns(own.columns(weight))
    assert (back[:, 5] == 0).all() and back.isfinite().all()


def test_the_format_lists_the_tensors(llama: Path) -> None:
    model = SourceModel(llama)
    stored = checkpoint.StoredFormat(ResQConfig(), tied_head=False)
    expected = checkpoint.quantized_tensors(model.shape, stored)
    for name, tensor in linear_bases(model, uneven_rotation(model)).items():
        shape, dtypes = expected[name]
        assert tensor.shape == shape and tensor.dtype in dtypes
    for old in (stored._replace(version=5), stored._replace(config=ResQConfig(method="rtn"))):
        names = checkpoint.quantized_tensors(model.shape, old)
        assert not any(name.startswith(architecture.BASIS_LINEARS) for name in names)
