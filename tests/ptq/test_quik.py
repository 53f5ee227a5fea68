"""Method "quik": permutations by amplitude, and the weights that they leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ptq_models import MODELS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resq_kernels.architecture import BASIS_ROTATION, DOWN_PROJ, GATE_UP, O_PROJ, QKV, layer_prefix
from resq_kernels.config import PRESETS, ResQConfig
from resq_kernels.formats import QuantizedWeight
from resq_kernels.ptq import calibrate as stage
from resq_kernels.ptq.amplitudes import Amplitudes, measure_amplitudes, permutations
from resq_kernels.ptq.decoder import product_dtype, rope_tables
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.rotate import Rotation
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.safetensors_io import CheckpointReader
from resq_kernels.testing.tiny_models import save_tiny_model
from resq_kernels.weights import quantize_weight

QUIK = ResQConfig(method="quik")


def amplitudes_of(folder: Path, tokens: torch.Tensor, work: Path) -> Amplitudes:
    work.mkdir(exist_ok=True)
    model = SourceModel(folder)
    rope = rope_tables(model.reader.config, folder, tokens.shape[1])
    return measure_amplitudes(model, tokens, rope, Workspace(work), progress=False)


def amplitudes_by_hooks(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of the float64 source model; keys are those of transformers' cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    shape, found = SourceModel(folder).shape, dict[str, list[torch.Tensor]]()

    def hook(name: str):  # noqa: ANN202  a closure for one module
        return lambda _, args: found.setdefault(name, []).append(args[0].flatten(0, -2).abs())

    for layer in model.model.layers:
        for name in (QKV[0], O_PROJ, GATE_UP[0], DOWN_PROJ):
            layer.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    hidden = zip(found[QKV[0]], found[GATE_UP[0]], strict=True)
    heads = (shape.kv_heads, -1, shape.head_dim)
    return {
        "hidden": torch.stack([torch.stack(pair).amax(1) for pair in hidden]),
        "attended": torch.stack([x.unflatten(1, heads).amax((0, 2)) for x in found[O_PROJ]]),
        "keys": torch.stack([layer.keys.abs().amax((0, 1, 2)) for layer in cache.layers]),
        "intermediate": torch.stack([x.amax(0) for x in found[DOWN_PROJ]]),
    }


def is_permutation(matrix: torch.Tensor) -> bool:
    ones = ((matrix == 0) | (matrix == 1)).all()
    return bool(ones and (matrix.sum(-1) == 1).all() and (matrix.sum(-2) == 1).all())


def test_the_largest_channels_are_last(
    any_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BATCH_TOKENS", 80)  # two windows and one: several batches
    tokens, model = torch.randint(0, 256, (3, 40)), SourceModel(any_model)
    amplitudes = amplitudes_of(any_model, tokens, tmp_path)
    # As of the second moments (test_calibrate.py), of a single value.
    bfloat16 = product_dtype(model.dtype, "cpu") == torch.bfloat16
    tolerance = 3e-2 if bfloat16 else 2e-5
    expected = amplitudes_by_hooks(any_model, tokens)
    for name, exact in expected.items():
        got = getattr(amplitudes, name)
        assert got.shape == exact.shape and got.dtype == torch.float32
        largest = exact.amax(-1, keepdim=True)
        assert ((got - exact).abs() < tolerance * largest).all(), name
        assert not ((got * (1 + 3 * tolerance) - exact).abs() < tolerance * largest).all()

    rotation = permutations(amplitudes, model.shape)
    hidden = expected["hidden"]
    sites = {
        "hidden": (hidden / hidden.mean(-1, keepdim=True)).mean((0, 1)),
        "values": expected["attended"],
        "keys": expected["keys"],
    }
    for name, exact in sites.items():
        matrix = getattr(rotation, name).double()
        assert is_permutation(matrix)
        ascending = (exact.unsqueeze(-2) @ matrix).squeeze(-2)
        slack = 2 * tolerance * exact.amax(-1, keepdim=True)
        assert (ascending.diff() > -slack).all()
        high = exact.shape[-1] // 8
        chosen, others = ascending[..., -high:], ascending[..., :-high]
        assert (chosen.amin(-1) > others.amax(-1) - slack[..., 0]).all()
        assert chosen.sum() > 0.99 * exact.topk(high).values.sum()
    assert not torch.equal(rotation.hidden, torch.eye(model.shape.hidden))
    assert torch.equal(rotation.values_inverse, rotation.values.mT)
    channels = rotation.intermediate_order
    assert torch.equal(channels.sort().values, torch.arange(channels.shape[1]).expand_as(channels))
    ascending = expected["intermediate"].gather(1, channels)
    assert (ascending.diff() > -2 * tolerance * ascending.amax()).all()
    for factors in (rotation.key_factors, rotation.intermediate_factors):
        assert torch.equal(factors, torch.ones_like(factors))


def permuted(
    model: SourceModel, rotation: Rotation, index: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights and biases of a layer with rows and columns moved, by indexing alone."""
    shape, layer = model.shape, model.layer(index, fold_norms=False)
    head, group = shape.head_dim, shape.heads // shape.kv_heads
    hidden = rotation.hidden.argmax(0)
    values = rotation.values[index].argmax(1)  # [kv_heads, head_dim]: channel of every column
    starts = torch.arange(shape.heads)[:, None] * head
    columns = starts + values.repeat_interleave(group, dim=0)
    low = head - head // 8
    attended = torch.cat([columns[:, :low].flatten(), columns[:, low:].flatten()])
    channels, same = rotation.intermediate_order[index], slice(None)
    rows = {
        QKV[2]: (starts[: shape.kv_heads] + values).flatten(),
        O_PROJ: hidden,
        DOWN_PROJ: hidden,
        **dict.fromkeys(GATE_UP, channels),
    }
    reads = {O_PROJ: attended, DOWN_PROJ: channels}
    found = {}
    for name, weight in layer.weights.items():
        moved, bias = rows.get(name, same), layer.biases.get(name)
        weight = weight[moved][:, reads.get(name, hidden)]
        found[name] = weight, None if bias is None else bias[moved]
    return found


@pytest.mark.parametrize("share", [0.125, 0.25])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied-bf16", "qwen3"])
def test_weights_are_the_source_s_with_columns_moved(
    tmp_path: Path, tokens: torch.Tensor, name: str, share: float
) -> None:
    """Rounded to nearest: every code and scale is that of the moved weight, in both parts."""
    source = save_tiny_model(tmp_path / "source", **MODELS[name])
    config = dataclasses.replace(QUIK, weights="rtn", high_fraction=share)
    quantize_folder(source, tmp_path / "out", tokens, config, progress=False)
    model, stored = SourceModel(source), CheckpointReader(tmp_path / "out")
    rotation = permutations(amplitudes_of(source, tokens, tmp_path / "work"), model.shape)
    assert torch.equal(stored.load(BASIS_ROTATION), rotation.hidden.half())
    for index in range(model.shape.layers):
        prefix = layer_prefix(index)
        assert torch.equal(stored.load(f"{prefix}self_attn.key_rotation")[0], rotation.keys[index])
        for linear, (weight, bias) in permuted(model, rotation, index).items():
            columns = weight.shape[1]
            if linear == O_PROJ and share != 0.125:
                continue  # its columns are in another order
            expected = quantize_weight(weight, round(share * columns))
            got = QuantizedWeight.read(stored.load, prefix + linear)
            assert got.weight_hi.shape[1] == share * columns
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one, other), linear
            if bias is not None:
                assert torch.equal(stored.load(f"{prefix}{linear}.bias").float(), bias)


def test_a_seed_changes_nothing(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """On the same windows; `resq quantize` draws those by the seed."""
    for seed in (0, 1):
        config = dataclasses.replace(QUIK, seed=seed)
        quantize_folder(llama, tmp_path / f"{seed}", tokens, config, progress=False)
    one, other = (load_file(tmp_path / f"{seed}/model.safetensors") for seed in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_continues_to_the_same_bits(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once while it measures, and once between measuring and rounding."""

    class Interruption(Exception):
        pass

    def stop(*_: object) -> None:
        raise Interruption

    config, out = dataclasses.replace(QUIK, distill_epochs=1), tmp_path / "out"
    quantize_folder(llama, tmp_path / "whole", tokens, config, progress=False)
    save = Workspace.save
    for place in ("amplitudes-00001", "quantize-00000"):

        def save_until(
            work: Workspace, piece: str, tensors: dict[str, torch.Tensor], place: str = place
        ) -> None:
            (stop if piece == place else save)(work, piece, tensors)

        with monkeypatch.context() as patch, pytest.raises(Interruption):
            patch.setattr(Workspace, "save", save_until)
            quantize_folder(llama, out, tokens, config, resume=True, progress=False)
    quantize_folder(llama, out, tokens, config, resume=True, progress=False)
    one, other = (load_file(path / "model.safetensors") for path in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_numbers_that_are_not_finite(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 3e38
    tensors["model.layers.0.mlp.gate_proj.weight"][3] = 3e38
    save_file(tensors, folder / "model.safetensors")
    words = r"^calibration: layer 0: expected a finite amplitude \(intermediate\), got NaN or inf"
    with pytest.raises(ValueError, match=words):
        amplitudes_of(folder, tokens, tmp_path / "work")


def test_the_preset() -> None:
    config = ResQConfig.from_preset("quik", samples=8)
    assert config.preset == "quik" and config.method == "quik" and config.high_fraction == 0.125
    assert PRESETS["quik"] == {
        "method": "quik",
        "token_weights": "uniform",
        "hessian_inputs": "exact",
        "activation_clip": 1.0,
        "embedding_bits": 16,
        "dialogues": 0,
    }
    assert {"symmetric": False, "weights": "gptq", "kv_bits": 4}.items() <= config.to_dict().items()
    with pytest.raises(ValueError, match="^high_fraction: method 'rtn' is uniform 4-bit"):
        ResQConfig.from_preset("quik", method="rtn", high_fraction=0.125)
