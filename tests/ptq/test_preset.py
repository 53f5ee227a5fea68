"""The paper's choices: the preset, bases by variance alone, exact inputs for GPTQ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptq_models import MODELS
from transformers import AutoModelForCausalLM, PreTrainedModel

from resq_kernels import hadamard
from resq_kernels.architecture import DOWN_PROJ, GATE_UP, LINEARS, NORMS, O_PROJ, QKV, layer_prefix
from resq_kernels.config import PRESETS, ResQConfig
from resq_kernels.formats import QuantizedWeight
from resq_kernels.ptq import quantize as stage
from resq_kernels.ptq.basis import find_basis
from resq_kernels.ptq.calibrate import calibrate
from resq_kernels.ptq.decoder import rope_tables
from resq_kernels.ptq.fuse import o_column_order
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.rotate import rotate
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.safetensors_io import CheckpointReader
from resq_kernels.testing.tiny_models import save_tiny_model

PAPER = {
    "bases": "principal",
    "token_weights": "uniform",
    "hessian_inputs": "exact",
    "hadamard_block": 0,
    "activation_clip": 1.0,
    "embedding_bits": 16,
    "dialogues": 0,
}


def test_the_preset_sets_exactly_these_fields() -> None:
    defaults, paper = ResQConfig().to_dict(), ResQConfig.from_preset("paper")
    changed = {k: v for k, v in paper.to_dict().items() if v != defaults[k]}
    assert changed == PAPER == PRESETS["paper"]
    assert paper == ResQConfig(**PAPER) and paper.preset == "paper"
    assert paper.clip(504) == paper.clip(14336) == 1.0
    assert ResQConfig().preset is None


@pytest.mark.parametrize(
    ("field", "value", "preset"),
    [
        ("weights", "rtn", "paper"),
        ("seed", 3, "paper"),
        ("samples", 8, "paper"),
        ("embedding_bits", 8, None),
        ("bases", "balanced", None),
        ("activation_clip", None, None),
    ],
)
def test_an_option_overrides_the_preset(field: str, value: object, preset: str | None) -> None:
    config = ResQConfig.from_preset("paper", **{field: value})
    assert config == ResQConfig(**{**PAPER, field: value}) and config.preset == preset


def test_what_a_preset_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"^preset: expected one of paper, spinquant, quik, got 'papers'$"
    ):
        ResQConfig.from_preset("papers")
    with pytest.raises(TypeError, match="bits"):
        ResQConfig.from_preset("paper", bits=3)
    for method in ("quarot", "quik", "rtn"):
        words = f"^bases: method '{method}' has none, expected 'balanced' .*, got 'principal'$"
        with pytest.raises(ValueError, match=words):
            ResQConfig.from_preset("paper", method=method)


@pytest.fixture(scope="module")
def qwen2_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 folder: v_proj and k_proj have biases, which belong to values and keys."""
    return save_tiny_model(tmp_path_factory.mktemp("paper") / "model", **MODELS["qwen2"])


def inputs_of(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of a linear -> what it reads, and "values" -> what it gives, float64 [tokens, ...]."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str):  # noqa: ANN202  a closure for one module
        def keep(_: object, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            found[name], found[f"{name} output"] = args[0].flatten(0, -2), output.flatten(0, -2)

        return keep

    for index, layer in enumerate(model.model.layers):
        for name in LINEARS:
            layer.get_submodule(name).register_forward_hook(hook(f"{index} {name}"))
    with torch.no_grad():
        model(tokens)
    return found


def moment(x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("t...i,t...j->...ij", x, x) / len(x)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_principal_bases_are_eigenvectors_of_plain_moments(
    qwen2_float32: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = SourceModel(qwen2_float32)
    rope = rope_tables(model.reader.config, qwen2_float32, tokens.shape[1])
    works = (Workspace(tmp_path / name) for name in "ab")
    plain, weighted = (
        calibrate(model, tokens, rope, work, progress=False, weighted=weighted)
        for work, weighted in zip(works, (False, True), strict=True)
        if not work.root.mkdir()
    )
    exact = AutoModelForCausalLM.from_pretrained(qwen2_float32, dtype=torch.float64)
    found = inputs_of(exact, tokens)
    hidden = torch.zeros_like(plain.hidden)
    for index, layer in enumerate(exact.model.layers):
        for name, norm in ((QKV[0], NORMS[0]), (GATE_UP[0], NORMS[1])):
            gain = layer.get_submodule(norm).weight.detach()
            hidden += moment(found[f"{index} {name}"] / gain) / 2 / model.shape.layers
    assert relative(plain.hidden, hidden) < 2e-5 < 1e-3 < relative(weighted.hidden, hidden)

    basis = find_basis(model, plain, "principal")
    eye = torch.eye(model.shape.head_dim, dtype=torch.float64)
    for index in range(model.shape.layers):
        values = found[f"{index} {QKV[2]} output"].unflatten(1, (model.shape.kv_heads, -1))
        moments = {"values": moment(values), "keys": plain.keys[index].sum(0)}
        for name, turned in moments.items():
            vectors = getattr(basis, name)[index]
            assert (vectors.mT @ vectors - eye).abs().max() < 1e-12
            diagonal = vectors.mT @ turned @ vectors
            variances = diagonal.diagonal(dim1=-2, dim2=-1)
            scale = float(variances.amax())
            assert (diagonal - torch.diag_embed(variances)).abs().max() < 2e-5 * scale
            assert (variances.diff() > -2e-5 * scale).all()
            assert relative(getattr(basis, f"{name[:-1]}_variances")[index], variances) < 2e-5
    assert torch.equal(basis.values_inverse, basis.values.mT)
    for factors in (basis.key_factors, basis.intermediate_factors):
        assert torch.equal(factors, torch.ones_like(factors))
    turned = rotate(basis, model.shape, ResQConfig.from_preset("paper"))
    assert (turned.values @ turned.values_inverse - eye).abs().max() < 1e-12
    assert (turned.values.mT @ turned.values - eye).abs().max() < 1e-12


def float_model(folder: Path, source: Path, config: ResQConfig) -> PreTrainedModel:
    """A folder's weights in the source's class, float64; hooks do what stands between linears.

    Keys and queries stay unrotated: an orthogonal matrix on both leaves attention as it is.
    """
    reader, shape = CheckpointReader(folder), SourceModel(source).shape
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    names = model.state_dict().keys()
    state = {name: reader.load(name) for name in names if name in reader}
    order = o_column_order(shape, config.high_fraction)
    for index, layer in enumerate(model.model.layers):
        for name in LINEARS:
            weight = QuantizedWeight.read(reader.load, layer_prefix(index) + name)
            state[f"{layer_prefix(index)}{name}.weight"] = weight.dequantize()
        layer.get_submodule(O_PROJ).register_forward_pre_hook(
            lambda _, args: (args[0][..., order],)
        )
        layer.get_submodule(DOWN_PROJ).register_forward_pre_hook(
            lambda _, args: (hadamard.transform_low(args[0], 0, 0),)
        )
    model.load_state_dict(state)
    return model


def test_exact_hessians_are_those_of_a_model_with_rounded_weights_alone(
    qwen2_float32: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear's inputs are those that the finished weights before it give in float64."""
    hessians: list[torch.Tensor] = []

    def keep(*args: object) -> object:
        hessians.append(args[1].clone())
        return gptq(*args)

    gptq = stage.gptq
    monkeypatch.setattr(stage, "gptq", keep)
    errors = {}
    for kind in ("exact", "rounded"):
        config, out = ResQConfig.from_preset("paper", hessian_inputs=kind), tmp_path / kind
        hessians.clear()
        quantize_folder(qwen2_float32, out, tokens, config, progress=False)
        found = inputs_of(float_model(out, qwen2_float32, config), tokens)
        groups = (QKV, (O_PROJ,), GATE_UP, (DOWN_PROJ,))
        expected = [moment(found[f"{index} {names[0]}"]) for index in (0, 1) for names in groups]
        errors[kind] = list(map(relative, hessians, expected))
    # Queries and keys are multiplied by a rotation in float16.
    assert max(errors["exact"]) < 1e-3
    assert min(errors["rounded"]) > 2e-3, errors
