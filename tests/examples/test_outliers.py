"""Planted outliers: the same function, with channels that stand out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outliers import (
    OutlierStrengths,
    concentrating_basis,
    fold_norms,
    outlier_report,
    plant_outliers,
    residual_moment,
    untie_embedding,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

NONE = OutlierStrengths(
    massive_channels=0, norm_channels=0, value_channels=0, key_pairs=0, mlp_channels=0
)
FACTORS_ONLY = OutlierStrengths(massive_channels=0)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def build(kind: str) -> PreTrainedModel:
    """Build a small random model; norms and biases are random too, so that no edit is hidden."""
    torch.manual_seed(3)
    if kind == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    elif kind == "llama-biases":
        config = LlamaConfig(**SIZES, head_dim=24, attention_bias=True, mlp_bias=True)
        model = LlamaForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def token_ids() -> torch.Tensor:
    """Draw random token ids of shape (6, 48)."""
    return torch.randint(SIZES["vocab_size"], (6, 48), generator=torch.Generator().manual_seed(5))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Run a model on :func:`token_ids`."""
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen2"])
def test_all_edits_preserve_the_logits(kind: str) -> None:
    model = build(kind)
    expected = logits_of(model)
    assert plant_outliers(model, token_ids(), seed=1) is model
    # Each sum over n <= 128 terms rounds by about sqrt(n) * 2^-24 of its size, and some 7 sums per
    # layer follow each other: 3 * 7 * sqrt(128) * 2^-24 = 1.4e-5, times the margin of the softmax
    # and norms between them.
    error = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen2"])
def test_power_of_two_factors_change_exponents_only(kind: str) -> None:
    model = build(kind)
    expected = logits_of(model)
    plant_outliers(model, None, FACTORS_ONLY, seed=1)
    # Every product keeps its value; only libraries that sum in another order could differ.
    error = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert error < 2e-6

    half = build(kind).to(torch.bfloat16)
    plant_outliers(half, None, FACTORS_ONLY, seed=1)
    rounded = build(kind).to(torch.bfloat16).float()
    plant_outliers(rounded, None, FACTORS_ONLY, seed=1)
    for (name, stored), other in zip(half.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(stored.float(), other), name


@pytest.mark.parametrize("field", ["norm", "value", "key", "mlp"])
def test_each_kind_makes_its_own_outliers(field: str) -> None:
    counts = {"norm": "norm_channels", "value": "value_channels", "key": "key_pairs"}
    count = counts.get(field, "mlp_channels")
    places = {
        "norm": ("attention_input", "mlp_input"),
        "value": ("values",),
        "key": ("keys",),
        "mlp": ("down_input",),
    }
    strengths = OutlierStrengths(**{**vars(NONE), count: 2, f"{field}_factor": 64.0})
    model = build("qwen2")
    before = outlier_report(model, token_ids())
    plant_outliers(model, None, strengths)
    after = outlier_report(model, token_ids())
    for place, ratio in after.items():
        if place in places[field]:
            # Drawn channels are typical ones, so 64 times their size is far above the median
            # channel; 16 leaves a factor of 4 for a small one.
            assert ratio > 16, place
            assert ratio > 3 * before[place], place
        else:
            assert ratio == pytest.approx(before[place], rel=1e-3), place


def test_basis_concentrates_the_residual_stream() -> None:
    model = build("llama")
    # A common direction added to every embedding gives the stream a dominant eigenvector that is
    # spread over all channels, as in trained models.
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.add_(0.5 * torch.randn(weight.shape[1]).sign())
    before = outlier_report(model, token_ids())["residual"]
    moment = residual_moment(model, token_ids())
    strengths = OutlierStrengths(**{**vars(NONE), "massive_channels": 2})
    plant_outliers(model, token_ids(), strengths)
    assert outlier_report(model, token_ids())["residual"] > 2 * before
    energy = residual_moment(model, token_ids()).diagonal().sort(descending=True).values
    # The two largest channels carry what the two leading eigenvectors carried.
    expected = torch.linalg.eigvalsh(moment).flip(0)[:2]
    torch.testing.assert_close(energy[:2], expected, rtol=1e-4, atol=0)


def test_basis_is_orthogonal_and_near_the_axes() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 32, dtype=torch.float64)
    channels = torch.tensor([7, 3, 20])
    basis = concentrating_basis(rows.T @ rows, channels)
    eye = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-12)
    others = [i for i in range(32) if i not in channels.tolist()]
    assert basis[others, others].mean() > 0.7


def test_folding_sets_unit_gains_and_keeps_the_function() -> None:
    model = build("qwen2")
    expected = logits_of(model)
    untie_embedding(model)
    fold_norms(model)
    assert torch.equal(model.model.norm.weight, torch.ones(SIZES["hidden_size"]))
    error = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_untied_model_survives_saving(tmp_path: Path) -> None:
    model = build("llama")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    plant_outliers(model, token_ids())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.tie_word_embeddings is False
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-6)


def test_seed_decides_the_channels() -> None:
    def gains(seed: int) -> torch.Tensor:
        model = plant_outliers(build("llama"), None, FACTORS_ONLY, seed=seed)
        return model.model.layers[0].input_layernorm.weight

    assert torch.equal(gains(0), gains(0))
    assert not torch.equal(gains(0), gains(1))


def test_factors() -> None:
    assert OutlierStrengths().factor(20.0) == 16.0
    assert OutlierStrengths(powers_of_two=False).factor(20.0) == 20.0
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive and finite"):
            OutlierStrengths().factor(bad)


def test_unsupported_models_are_refused() -> None:
    model = build("llama")
    model.config.model_type = "qwen3"
    with pytest.raises(ValueError, match="qwen3"):
        plant_outliers(model)
    with pytest.raises(ValueError, match="cannot choose"):
        plant_outliers(build("llama"), None, OutlierStrengths(norm_channels=65))
