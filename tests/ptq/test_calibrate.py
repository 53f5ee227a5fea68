"""Windows of tokens, and second moments against hooks on the source model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resq_kernels.ptq import calibrate as stage
from resq_kernels.ptq.calibrate import calibrate, check_tokens, windows
from resq_kernels.ptq.decoder import product_dtype, rope_tables
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.token_weights import QUERY_STRIDE
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.testing.tiny_models import make_tokenizer


def moments_by_hooks(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """E[x x^T] of what the linears of the float64 source model read; inputs of attention weighted
    by transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    inputs: dict[str, torch.Tensor] = {}

    def hook(name: str):  # noqa: ANN202  a closure for one module
        return lambda _, args: inputs.__setitem__(name, args[0].flatten(0, -2))

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(hook(f"qkv{index}"))
        layer.mlp.gate_proj.register_forward_pre_hook(hook(f"gate{index}"))
        layer.self_attn.o_proj.register_forward_pre_hook(hook(f"o{index}"))
        layer.mlp.down_proj.register_forward_pre_hook(hook(f"down{index}"))
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    config, count = model.config, tokens.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, attended, intermediate = 0, [], []
    for index, layer in enumerate(model.model.layers):
        looked = attentions[index][:, :, range(tokens.shape[1] - 1, -1, -QUERY_STRIDE)]
        share = tokens.shape[1] / looked.shape[2]
        received = 1 + share * looked.square().sum(2).mean(1)
        weights = (received / received.mean(1, keepdim=True)).flatten()
        for name, norm, weight in (
            (f"qkv{index}", layer.input_layernorm, weights),
            (f"gate{index}", layer.post_attention_layernorm, torch.ones_like(weights)),
        ):
            x = inputs[name] / norm.weight
            hidden = hidden + (weight * x.T) @ x / count / 2 / config.num_hidden_layers
        heads = inputs[f"o{index}"].unflatten(1, (config.num_key_value_heads, -1, head_dim))
        group = heads.shape[2]
        attended.append(torch.einsum("tkgi,tkgj->kij", heads, heads) / count / group)
        intermediate.append(inputs[f"down{index}"].square().mean(0))
    return {
        "hidden": hidden.detach(),
        "attended": torch.stack(attended).detach(),
        "intermediate": torch.stack(intermediate).detach(),
    }


def test_moments_are_those_of_the_source_model(
    any_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BATCH_TOKENS", 80)  # two windows and one: several batches
    tokens = torch.randint(0, 256, (3, 40))
    model = SourceModel(any_model)
    rope = rope_tables(model.reader.config, any_model, 40)
    moments = calibrate(model, tokens, rope, Workspace(tmp_path), progress=False)
    # The linears round to 2^-9 in bfloat16, once per operand and result; in float32 there are a few
    # hundred operations of 2^-24 in a row.
    bfloat16 = product_dtype(model.dtype, "cpu") == torch.bfloat16
    tolerance = 1e-2 if bfloat16 else 2e-5
    for name, expected in moments_by_hooks(any_model, tokens).items():
        got = getattr(moments, name)
        assert (got - expected).norm() < tolerance * expected.norm(), name
        wrong = got * (1 + 3 * tolerance)
        assert (wrong - expected).norm() > tolerance * expected.norm(), name
    for name in ("keys", "queries"):
        moment = getattr(moments, name)
        assert moment.dtype == torch.float64 and (moment - moment.mT).abs().max() < 1e-9
        variances = torch.linalg.eigvalsh(moment)  # of fewer tokens than dims: some are 0
        assert (variances > -1e-7 * variances.amax()).all()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "hidden-moment-00001.safetensors",
        "moments-00000.safetensors",
        "moments-00001.safetensors",
    ]


def test_keys_are_measured_after_rope(llama: Path, tmp_path: Path) -> None:
    """One token per window: position 0 leaves keys as they are, so the moment is k_proj's."""
    tokens = torch.arange(6).view(6, 1)
    model = SourceModel(llama)
    rope = rope_tables(model.reader.config, llama, 1)
    moments = calibrate(model, tokens, rope, Workspace(tmp_path), progress=False)
    layer = model.layer(0, fold_norms=True)
    x = model.embed(tokens[:, 0])
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.shape.norm_eps)
    keys = (x @ layer.weights["self_attn.k_proj"].T).double().unflatten(1, (2, 64))
    expected = torch.einsum("tki,tkj->kij", keys, keys) / 6
    assert (moments.keys[0] - expected).norm() < 1e-5 * expected.norm()


def test_windows_come_from_the_text_once() -> None:
    tokenizer = make_tokenizer()
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    cut = windows(tokenizer, [text[:500], text[500:]], 10, 32, seed=1).calibration
    assert cut.shape == (10, 32) and cut.dtype == torch.int64
    assert torch.equal(cut, windows(tokenizer, text, 10, 32, seed=1).calibration)
    assert not torch.equal(cut, windows(tokenizer, text, 10, 32, seed=2).calibration)
    pieces = [tokenizer.decode(row) for row in cut]
    assert all(piece in text for piece in pieces)
    everything = windows(tokenizer, text, 31, 32).calibration
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = {tuple(ids[i : i + 32]) for i in range(len(ids))}
    assert everything.shape == (31, 32) and all(tuple(r.tolist()) in starts for r in everything)


def test_held_out_windows_are_others() -> None:
    tokenizer, ids = make_tokenizer(), list(range(250)) * 4
    text = tokenizer.decode(ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    alone = windows(tokenizer, text, 10, 32, seed=1)
    assert alone.held_out.shape == (0, 32)
    calibration, held_out = windows(tokenizer, text, 10, 32, seed=1, held_out=4)
    assert torch.equal(calibration, alone.calibration) and held_out.shape == (4, 32)
    everything = windows(tokenizer, text, len(ids) // 32, 32, seed=1).calibration
    assert torch.equal(everything[:14], torch.cat([calibration, held_out]))
    for wanted, got in ((len(ids) // 32 - 10, None), (len(ids) // 32 - 3, 3), (10**6, 0)):
        samples = len(ids) // 32 - (got if got is not None else wanted)
        found = windows(tokenizer, text, samples, 32, seed=1, held_out=wanted).held_out
        assert len(found) == (wanted if got is None else got)


def test_short_text() -> None:
    tokenizer = make_tokenizer()
    with pytest.warns(UserWarning, match="100 tokens give 3 windows of 32 instead of 8"):
        assert windows(tokenizer, "x" * 100, 8, 32).calibration.shape == (3, 32)
    for text, count in (("", 0), (["ab", "c"], 3)):
        with pytest.raises(ValueError, match=rf"at least 32 tokens \(one window\), got {count}"):
            windows(tokenizer, text, 8, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert windows(tokenizer, "x" * 32, 1, 32).calibration.shape == (1, 32)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), r"int64 \[windows, seqlen\], got int32 \[2, 8\]"),
        (torch.zeros(8, dtype=torch.int64), r"got int64 \[8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"got int64 \[0, 8\]"),
        (torch.full((1, 8), 320), "from 0 to 319 .*, got 320; is this the model's tokenizer"),
        (torch.full((1, 8), -1), "got -1"),
    ],
)
def test_tokens_that_the_model_cannot_read(llama: Path, tokens: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_tokens(tokens, SourceModel(llama).shape)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), "up_proj.weight: expected finite"),
        ("model.embed_tokens.weight", float("inf"), "embed_tokens.weight: expected finite"),
        ("model.layers.0.mlp.up_proj.weight", 1e38, "layer 0: expected a finite second moment"),
    ],
)
def test_numbers_that_are_not_finite(
    llama: Path, tmp_path: Path, tokens: torch.Tensor, name: str, value: float, words: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    tensors[name][3] = value
    save_file(tensors, folder / "model.safetensors")
    model = SourceModel(folder)
    rope = rope_tables(model.reader.config, folder, tokens.shape[1])
    work = Workspace(tmp_path / "work")
    work.root.mkdir()
    with pytest.raises(ValueError, match=words):
        calibrate(model, tokens, rope, work, progress=False)


def test_linears_are_computed_in_the_source_s_dtype_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert product_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if fast else torch.float32)
        assert product_dtype(torch.float16, "cpu") == torch.float32
        assert product_dtype(torch.float32, "cpu") == torch.float32
