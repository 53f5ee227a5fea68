"""`resq quantize` of pickles, GGUF files and folders that are quantized already: the bytes of OUT
are those of the folder of float weights that each stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import POSITIONS, Result
from safetensors.torch import load_file, save_file
from source_cases import (
    CARD,
    CONFIG,
    SHARDS,
    WEIGHTS,
    edit,
    folder,
    fp8,
    gguf_file,
    legacy,
    pickled,
    same,
    sharded,
    single,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from resq_kernels.commands import loading
from resq_kernels.ptq.float_folder import Source
from resq_kernels.testing.tiny_gguf import TEMPLATE, write_gguf
from resq_kernels.testing.tiny_models import make_model


@pytest.fixture
def options(text_file: Path) -> tuple[object, ...]:
    return ("--calib", text_file, "--samples", 2, "--seqlen", 32)


@pytest.mark.parametrize("write", [single, legacy, sharded])
def test_pickles_give_the_bytes_of_safetensors(
    tmp_path: Path, options: Any, resq: Callable[..., Result], write: Any
) -> None:
    """With everything that lies beside the weights, and nothing else beside OUT afterwards."""
    plain = folder(tmp_path / "plain" / "model")
    source = pickled(plain, tmp_path / "pickles" / "model", write)
    for name, model in (("a", plain), ("b", source)):
        result = resq("quantize", model, tmp_path / "out" / name, *options)
        assert result.code == 0, result.err
    a, b = tmp_path / "out" / "a", tmp_path / "out" / "b"
    names = {path.name for path in a.iterdir()} - {"quantization_report.html"}
    names -= {"quantization_report.json"}
    assert names >= {"LICENSE", "tokenizer.json", CARD} and same(a, b, tuple(names))
    assert json.loads((b / "quantization_report.json").read_text())["model"] == "model"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}


def test_a_warning_names_the_source(
    tmp_path: Path, options: Any, resq: Callable[..., Result]
) -> None:
    source = pickled(folder(tmp_path / "plain"), tmp_path / "model")
    edit(source, tie_word_embeddings=True)
    result = resq("quantize", source, tmp_path / "out", *options)
    assert result.code == 0 and f"resq: warning: {source}: config.json says" in result.err


def test_a_dtype_that_only_the_pickle_says(
    tmp_path: Path, options: Any, resq: Callable[..., Result]
) -> None:
    """Of its first tensor, which is not the first by name."""
    plain = folder(tmp_path / "plain" / "model")
    source = pickled(plain, tmp_path / "pickles" / "model", lambda path, tensors: None)
    tensors = load_file(plain / WEIGHTS)
    first = {"model.norm.weight": tensors.pop("model.norm.weight").half()}
    single(source, first | {name: tensor.float() for name, tensor in tensors.items()})
    config = json.loads((source / CONFIG).read_text())
    del config["dtype"]
    (source / CONFIG).write_text(json.dumps(config))
    assert resq("quantize", source, tmp_path / "out", *options).code == 0
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == expected == torch.float16


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", "F32"), ("llama", "F16"), ("llama", "Q4_0"), ("qwen2", "Q8_0")],
)
def test_gguf_gives_the_bytes_of_what_it_stores(
    tmp_path: Path, options: Any, resq: Callable[..., Result], model_type: str, kind: str
) -> None:
    plain = tmp_path / "plain"
    source = gguf_file(plain, tmp_path / "m.Q.gguf", kind, model_type)
    a, b = tmp_path / "out" / "a", tmp_path / "out" / "b"
    for out, model in ((a, plain), (b, source)):
        result = resq("quantize", model, out, *options)
        assert result.code == 0, result.err
    assert same(a, b, (WEIGHTS,))
    left, right = (AutoConfig.from_pretrained(path).to_dict() for path in (a, b))
    assert left | {"_name_or_path": str(b)} == right
    assert AutoTokenizer.from_pretrained(b).chat_template == TEMPLATE
    assert json.loads((b / "generation_config.json").read_text())["eos_token_id"] == 256
    assert "# m.Q, quantized" in (b / CARD).read_text()
    assert "license: apache-2.0" in (b / CARD).read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}


def test_a_file_is_gguf_by_its_ending_and_a_folder_never(tmp_path: Path) -> None:
    plain = folder(tmp_path / "model.gguf")
    assert Source(plain).kind == "plain" and not loading.is_gguf(str(plain))
    for name in ("m.gguf", "M.GGUF"):
        (tmp_path / name).touch()
        assert Source(tmp_path / name).kind == "gguf" and loading.is_gguf(str(tmp_path / name))


def test_a_gguf_file_is_a_16_bit_model_of_the_other_commands(
    tmp_path: Path, options: Any, text_file: Path, resq: Callable[..., Result]
) -> None:
    plain = tmp_path / "plain"
    source = gguf_file(plain, tmp_path / "m.gguf", "Q8_0")
    text = ("--text", text_file, "--seqlen", 32, "--json", tmp_path / "f.json")
    figures = []
    for model in (plain, source):
        assert resq("eval", model, *text, "--reference", source).code == 0
        figures.append(json.loads((tmp_path / "f.json").read_text()))
    assert figures[0]["perplexity"] == figures[1]["perplexity"]
    assert figures[0]["kl_to_reference"] == figures[1]["kl_to_reference"] == 0
    assert resq("compare", plain, "--reference", source, *text).code == 0
    prompt = ("--prompt", "a line", "--max-new-tokens", 4)
    assert resq("generate", plain, *prompt).out == resq("generate", source, *prompt).out
    assert "LlamaForCausalLM" in resq("info", source).out
    missing = resq("eval", tmp_path / "none.gguf", *text)
    assert missing.code == 1 and "none.gguf: there is no such file" in missing.sentence


def test_a_tokenizer_from_elsewhere(
    tmp_path: Path, options: Any, resq: Callable[..., Result]
) -> None:
    source = gguf_file(tmp_path / "plain", tmp_path / "m.gguf", "Q8_0")
    write_gguf(source, make_model(max_position_embeddings=POSITIONS), "Q8_0", pre="default")
    refused = resq("quantize", source, tmp_path / "out", *options)
    assert refused.code == 1 and "tokenizer.ggml.pre: expected one of" in refused.sentence
    assert "--tokenizer" in refused.sentence and not (tmp_path / "out").exists()
    other = folder(tmp_path / "other")
    result = resq("quantize", source, tmp_path / "out", *options, "--tokenizer", other)
    assert result.code == 0, result.err
    assert same(tmp_path / "out", other, ("tokenizer.json", "LICENSE"))
    assert "license: mit" in (tmp_path / "out" / CARD).read_text()
    wrong = resq("quantize", other, tmp_path / "out2", *options, "--tokenizer", other)
    assert wrong.code == 2 and "--tokenizer: expected a GGUF file as MODEL" in wrong.sentence


def test_fp8_gives_the_bytes_of_what_it_stores(
    tmp_path: Path, options: Any, resq: Callable[..., Result]
) -> None:
    pytest.importorskip("accelerate")
    plain = folder(tmp_path / "plain" / "model")
    source = fp8(plain, tmp_path / "fp8" / "model")
    for name, model in (("a", plain), ("b", source)):
        result = resq("quantize", model, tmp_path / "out" / name, *options)
        assert result.code == 0, result.err
    assert same(tmp_path / "out" / "a", tmp_path / "out" / "b", (WEIGHTS, CONFIG, CARD))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_tensors_give_the_bytes_of_what_they_store(
    tmp_path: Path, options: Any, resq: Callable[..., Result], bits: int
) -> None:
    pytest.importorskip("compressed_tensors")
    plain = folder(tmp_path / "plain" / "model")
    source = tmp_path / "compressed" / "model"
    tensors = load_file(plain / WEIGHTS)
    stored, expected = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj" not in name:
            continue
        place = name.removesuffix(".weight")
        scales = (weight.float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).to(
            weight.dtype
        )
        limit = 2 ** (bits - 1)
        codes = (weight.float() / scales.float()).round().clamp(-limit, limit - 1)
        expected[name] = codes.to(weight.dtype) * scales
        stored[f"{place}.weight_scale"] = scales
        if bits == 8:
            stored[name] = codes.to(torch.int8)
        else:  # eight codes in an int32, the first in the lowest bits, each plus 8
            del stored[name]
            nibbles = (codes.long() + 8).reshape(len(codes), -1, 8) << (4 * torch.arange(8))
            stored[f"{place}.weight_packed"] = nibbles.sum(-1).to(torch.int32)
            stored[f"{place}.weight_shape"] = torch.tensor(weight.shape)
    shutil.copytree(plain, source)
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    save_file(expected, plain / WEIGHTS, metadata={"format": "pt"})
    form = {8: "int-quantized", 4: "pack-quantized"}[bits]
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    entry = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    entry |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    edit(source, quantization_config=entry | {"quantization_status": "compressed"})
    for name, model in (("a", plain), ("b", source)):
        result = resq("quantize", model, tmp_path / name, *options)
        assert result.code == 0, result.err
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_gives_the_bytes_of_what_it_stores(
    tmp_path: Path, options: Any, resq: Callable[..., Result], option: str
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import BitsAndBytesConfig

    plain = folder(tmp_path / "plain" / "model")
    source = tmp_path / "quantized" / "model"
    quantized = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**{option: True}), dtype=torch.bfloat16
    )
    shutil.copytree(plain, source)
    quantized.save_pretrained(source)
    stored, expected = load_file(source / WEIGHTS), load_file(plain / WEIGHTS)
    for name, weight in expected.items():
        if "_proj" not in name:
            continue
        place = name.removesuffix(".weight")
        if option == "load_in_8bit":
            scales = stored[f"{place}.SCB"][:, None] / 127
            expected[name] = (stored[name].float() * scales).to(weight.dtype)
        else:
            module = quantized.get_submodule(place)
            values = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            expected[name] = values.to(weight.dtype)
    save_file(expected, plain / WEIGHTS, metadata={"format": "pt"})
    for name, model in (("a", plain), ("b", source)):
        result = resq("quantize", model, tmp_path / name, *options)
        assert result.code == 0, result.err
    assert same(tmp_path / "a", tmp_path / "b", (WEIGHTS,))


def lost_scale(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def ragged(path: Path) -> None:
    edit(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 64]})


def no_pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    (path / "pytorch_model.bin").write_bytes(b"PK\3\4" + bytes(100))


def not_tensors(path: Path) -> None:
    torch.save({"model": load_file(path / WEIGHTS)}, path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def objects(path: Path) -> None:
    torch.save({"a": Path("x")}, path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def no_shard(path: Path) -> None:
    sharded(path, load_file(path / WEIGHTS))
    (path / WEIGHTS).unlink()
    (path / SHARDS[1]).unlink()


def no_norm(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["model.norm.weight"]
    single(path, tensors)
    (path / WEIGHTS).unlink()


def by(method: str, **settings: object) -> Callable[[Path], None]:
    return lambda path: edit(path, quantization_config={"quant_method": method, **settings})


REFUSED = {
    "awq": (
        by("awq"),
        "already quantized (awq), which cannot be turned back into 16 bits; give the",
    ),
    "gptq": (
        by("gptq", bits=4),
        "quantized (gptq), which cannot be turned back into 16 bits; give",
    ),
    "lost scale": (
        lost_scale,
        "up_proj.weight: expected weight_scale_inv beside it, found nothing",
    ),
    "ragged": (ragged, "down_proj.weight: expected whole blocks of [128, 64], got [128, 192] with"),
    "no pickle": (
        no_pickle,
        "pytorch_model.bin: expected weights that torch.save wrote, got a file",
    ),
    "not tensors": (not_tensors, "pytorch_model.bin: model: expected a tensor, got dict"),
    "objects": (
        objects,
        "pytorch_model.bin: expected weights that torch.save wrote, got a file that",
    ),
    "no shard": (no_shard, "pytorch_model-00002-of-00002.bin: expected a file of weights, found"),
    "no norm": (no_norm, "model.norm.weight: expected a tensor, found nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_and_nothing_is_left(
    tmp_path: Path, options: Any, resq: Callable[..., Result], case: str
) -> None:
    change, words = REFUSED[case]
    path = folder(tmp_path / "model")
    if case in ("lost scale", "ragged"):
        pytest.importorskip("accelerate")
        path = fp8(path, tmp_path / "fp8")
    change(path)
    before = sorted(tmp_path.rglob("*"))
    result = resq("quantize", path, tmp_path / "out", *options)
    assert result.code == 1 and words in result.sentence, result.err
    assert str(path) in result.sentence and ".source" not in result.sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
        ("fp8", "acc"),
    ],
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path,
    options: Any,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    package: str,
) -> None:
    path = folder(tmp_path / "model")
    by(method)(path)
    monkeypatch.setattr("resq_kernels.ptq.dequantized.importlib.util.find_spec", lambda name: None)
    result = resq("quantize", path, tmp_path / "out", *options)
    assert result.code == 1 and f"reading it needs `pip install {package}" in result.sentence


def test_the_package_of_gguf_files_is_named(
    tmp_path: Path, options: Any, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    result = resq("quantize", tmp_path / "m.gguf", tmp_path / "out", *options)
    assert result.code == 1 and "pip install 'resq_kernels[gguf]'" in result.sentence
