"""Saving and loading through transformers, and what it must refuse."""

import filecmp
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import resq_kernels
from resq_kernels import ResQConfig
from resq_kernels.architecture import SUPPORTED
from resq_kernels.checkpoint import validate
from resq_kernels.integrations.transformers import ResQQuantizationConfig, padding_mask
from resq_kernels.nn.generation import generating_class
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.safetensors_io import CheckpointError
from resq_kernels.testing.quantized_models import make_older, random_quantized
from resq_kernels.testing.tiny_models import make_model, make_tokenizer, save_tiny_model

LOADERS = [AutoModelForCausalLM.from_pretrained, resq_kernels.from_pretrained]
IDS = torch.randint(3, 250, (2, 14), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_quantized("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("options", [{}, {"method": "rtn"}, {"kv_bits": 16}], ids=str)
def test_round_trip(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    biases = {} if model_type == "llama" else {"attention_bias": True, "mlp_bias": True}
    model = random_quantized(model_type, ResQConfig(**options), **biases)
    model.save_pretrained(tmp_path / "once")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not any(info.values())
    assert validate(tmp_path / "once").kv_bits == options.get("kv_bits", 4)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "once" / name, tmp_path / "twice" / name, shallow=False)


def test_sharded(tmp_path: Path) -> None:
    model = random_quantized("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert logits(model).dtype == dtype
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        exact = name.endswith(("weight_lo", "weight_hi", "weight_scale", "rotation"))
        exact = exact or ".basis.linears." in name
        assert tensor.dtype == (stored[name].dtype if exact else dtype), name
        assert not exact or torch.equal(tensor, stored[name]), name


def test_model_without_a_head(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = whole(IDS, output_hidden_states=True)
        assert torch.equal(model(IDS).last_hidden_state, expected.hidden_states[-1])
        last = whole.model(IDS).last_hidden_state
        assert torch.equal(last, expected.hidden_states[-1])
        assert torch.equal(whole.lm_head(last), expected.logits)


HEADLESS = [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]


@pytest.mark.parametrize("auto", HEADLESS)
@pytest.mark.parametrize("options", [{}, {"embedding_bits": 16}], ids=str)
def test_a_model_without_a_head_is_saved_and_loaded(
    tmp_path: Path, auto: Any, options: dict[str, Any]
) -> None:
    random_quantized("llama", ResQConfig(**options)).save_pretrained(tmp_path / "model")
    model = auto.from_pretrained(tmp_path / "model", pad_token_id=0)
    model.save_pretrained(tmp_path / "again", max_shard_size="150KB")
    again, info = auto.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="lm_head.weight.*: expected a tensor, found"):
            load(tmp_path / "again")
    for file in (tmp_path / "again").glob("*.safetensors"):
        content = load_file(file)
        kept = {name: t for name, t in content.items() if not name.endswith("weight_scale")}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_scale: expected a tensor, found nothing"):
        auto.from_pretrained(tmp_path / "again")


def test_a_class_that_names_the_decoder_otherwise_is_refused(tmp_path: Path) -> None:
    """transformers would fill all of it with random numbers."""
    random_quantized("llama", ResQConfig(embedding_bits=16)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="got LlamaForQuestionAnswering, .* with 'transformer.'"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "llama")


def test_codes_are_not_kept_twice(folder: Path) -> None:
    model = resq_kernels.from_pretrained(folder)
    linears = [module for module in model.modules() if isinstance(module, ResQLinear)]
    assert len(linears) == 10  # four a layer, the embedding and the head
    assert all(m.is_packed and m.weight_lo is None and m.weight_hi is None for m in linears)


def test_quantize_from_python(tmp_path: Path) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 100]
    source = make_model("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    config = ResQConfig(weights="rtn", samples=4, seqlen=64)
    quantized = resq_kernels.quantize(source, make_tokenizer(), texts, config, progress=False)
    assert type(quantized) is generating_class(type(source)) and quantized.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    error = (logits(quantized) - logits(source)).norm() / logits(source).norm()
    assert 0.01 < error < 0.4
    quantized.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(quantized))
    with pytest.raises(ValueError, match="expected a float model, got a quantized one"):
        resq_kernels.quantize(quantized, make_tokenizer(), texts, config)
    with pytest.raises(ValueError, match="expected at least 64 tokens"):
        resq_kernels.quantize(source, make_tokenizer(), ["short"], config)


def test_a_float_model_must_be_quantized_first(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    for config in (ResQConfig(), ResQQuantizationConfig(), {"quant_method": "resq"}):
        with pytest.raises(ValueError, match="run `resq quantize MODEL OUT`"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(
        ValueError, match="expected a model quantized with ResQ, got quant_method None"
    ):
        resq_kernels.from_pretrained(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    entry = config["quantization_config"]
    for key, value in changes.items():
        (entry if key in entry else config)[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 7}, "format_version: expected 1 to 6, got 7; a newer resq_kernels"),
        ({"rotation_hash": "sha256:0"}, "rotation: expected the hash sha256:0"),
        ({"kv_bits": 5}, "kv_bits: expected one of 4, 16, got 5"),
        ({"high_fraction": 0.25}, "expected uint8"),
        ({"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_config_is_refused(
    folder: Path, load: Any, changes: dict[str, Any], words: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_damaged_tensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_lo"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    cast = {**tensors, name: tensors[name].to(torch.int8)}
    for broken, words in ((missing, "expected a tensor, found nothing"), (cast, "expected uint8")):
        save_file(broken, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}: {words}"):
            AutoModelForCausalLM.from_pretrained(folder)
    save_file(tensors, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="truncated: expected .* bytes up to the end of"):
            load(folder)


def test_another_architecture_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="gemma", architectures=["GemmaForCausalLM"])
    expected = ", ".join(SUPPORTED)
    with pytest.raises(ValueError, match=f"expected one of {expected}, got 'gemma'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_window_of_attention_is_refused(tmp_path: Path) -> None:
    random_quantized("mistral").save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=512)
    with pytest.raises(ValueError, match="sliding_window: expected null, as .* writes it, got 512"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_float_model_cannot_ask_for_our_attention(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder)
    model = make_model("llama")
    model.set_attn_implementation("resq")
    with pytest.raises(RuntimeError, match="expected a quantized model"):
        logits(model)


def test_padding_mask() -> None:
    full = torch.ones(2, 5, dtype=torch.bool)
    assert padding_mask(kv_length=5) is None
    assert padding_mask(kv_length=5, attention_mask=full) is full


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(folder)
    assert "resq" not in capfd.readouterr().err.lower()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_loaded_model_keeps_no_file_mapped(folder: Path) -> None:
    """Its memory is its own: packed codes, and copies of everything else."""
    model = resq_kernels.from_pretrained(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model(torch.ones(1, 3, dtype=torch.int64)).logits.isfinite().all()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A float model and its quantized folder."""
    source = make_model("qwen2").to(torch.bfloat16)
    text = "".join(chr(33 + (7 * i + i // 90) % 90) for i in range(4000))
    options = ResQConfig(weights="rtn", samples=8, seqlen=64)
    quantized = resq_kernels.quantize(source, make_tokenizer(), [text], options, progress=False)
    folder = tmp_path_factory.mktemp("real")
    quantized.save_pretrained(folder)
    return source, folder


@torch.no_grad()
def test_states_and_embeddings_are_those_of_the_source(real: tuple[Any, Path]) -> None:
    source, folder = real
    quantized = AutoModelForCausalLM.from_pretrained(folder)
    decoder = AutoModel.from_pretrained(folder)

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got - expected).float().norm() / expected.float().norm())

    expected = source(IDS, output_hidden_states=True)
    got = quantized(IDS, output_hidden_states=True)
    honest = error(got.logits, expected.logits)
    assert honest < 0.3
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert error(ours, theirs) < max(honest, 0.02)
    assert error(decoder(IDS).last_hidden_state, expected.hidden_states[-1]) < honest
    embeddings = source.get_input_embeddings()(IDS)
    assert error(quantized(inputs_embeds=embeddings).logits, expected.logits) < 1.2 * honest
    own = quantized.get_input_embeddings()(IDS)
    assert torch.equal(quantized(inputs_embeds=own).logits, got.logits)
    assert error(own, embeddings) < 0.02


@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_without_a_stored_basis(tmp_path: Path, version: int) -> None:
    """Formats 1 and 2 compute the same, and say what they cannot."""
    model = random_quantized(
        "llama", ResQConfig(embedding_bits=16, activation_clip=1.0, hadamard_block=0)
    )
    model.save_pretrained(tmp_path / "model")
    make_older(tmp_path / "model", version)
    older, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(older), logits(model))
    with pytest.raises(ValueError, match="hidden_basis: expected the rotation of the hidden"):
        older(IDS, output_hidden_states=True)
    older.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
