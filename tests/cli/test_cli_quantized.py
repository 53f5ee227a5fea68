"""The commands one after the other on models of four kinds: quantize, info, eval, generate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import POSITIONS, Result, byte_tokenizer, save
from transformers import AutoModelForCausalLM

from resq_kernels import from_pretrained, graph_decoding
from resq_kernels.commands import streaming
from resq_kernels.nn import generation
from resq_kernels.testing.tiny_models import make_model

PROMPT = "def f(x)"


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "smollm3"])
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model briefly trained on one sentence, and where its quantized form goes."""
    work = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = make_model(request.param, max_position_embeddings=POSITIONS).train()
    ids = torch.tensor([byte_tokenizer()(PROMPT + ": return x + 1\n" * 3)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(model.eval(), work / "source"), work / "out"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model was trained on, several times over."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((PROMPT + ": return x + 1\n" * 3) * 8)
    return path


def test_commands_follow_each_other(
    folders: tuple[Path, Path],
    text: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = folders
    options = ("--calib", text, "--samples", 4, "--seqlen", 48)
    assert resq("quantize", source, out, *options).code == 0

    linears = {}
    for folder in (source, out):
        target = tmp_path / "info.json"
        assert resq("info", folder, "--json", target).code == 0
        model = json.loads(target.read_text())["model"]
        linears[folder] = model["bytes"]["linears"]
    assert model["quantization"]["quant_method"] == "resq"
    # Seven eighths in 4 bits and one in 8, a little less of down_proj, against 32.
    assert 32 / 4.6 < linears[source] / linears[out] < 32 / 4

    found = {}
    for name, extra in (("kernels", ()), ("reference", ("--fake-quant",))):
        target = tmp_path / f"{name}.json"
        options = ("--text", text, "--reference", source, "--json", target, *extra)
        result = resq("eval", out, *options)
        assert result.code == 0, result.err
        assert ("fake quantization" in result.out) == bool(extra)
        found[name] = json.loads(target.read_text())
        assert found[name]["fake_quant"] == bool(extra)
        assert 0 < found[name]["kl_to_reference"] < 0.1
    target = tmp_path / "compare.json"
    options = ("--text", text, "--reference", source, "--json", target)
    assert resq("compare", out, *options).code == 0
    compared = json.loads(target.read_text())["folders"][0]
    for key in ("perplexity", "kl_to_reference", "top1_agreement"):
        assert compared[key] == pytest.approx(found["kernels"][key], rel=1e-12)
    assert compared["kl_interval"] > 0 and compared["top1_interval"] > 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert [place["error"] for place in compared["layers"]] == [
        place["error"] for place in report["layers"]
    ]
    plain = tmp_path / "plain.json"
    assert resq("eval", source, "--text", text, "--json", plain).code == 0
    baseline = json.loads(plain.read_text())["perplexity"]
    for name in found:
        assert found[name]["perplexity"] == pytest.approx(baseline, rel=0.1)
    assert found["kernels"]["perplexity"] == pytest.approx(
        found["reference"]["perplexity"], rel=0.02
    )

    generated = resq("generate", out, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert generated.code == 0
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(out).generate(
        **ids, max_new_tokens=12, do_sample=False
    )
    assert generated.out == byte_tokenizer().decode(tokens[0], skip_special_tokens=True) + "\n"

    model = AutoModelForCausalLM.from_pretrained(out)
    assert streaming._decoding(model, None)["custom_generate"].func is graph_decoding
    monkeypatch.setattr(streaming, "_decoding", lambda *_: {})
    monkeypatch.setattr(generation, "_does_the_same", lambda *_: False)
    ordinary = resq("generate", out, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert ordinary.out == generated.out, ordinary.err

    again = resq("quantize", out, tmp_path / "twice", "--calib", text)
    assert again.code == 1
    assert "already quantized (resq)" in again.sentence


def test_activations_in_eight_bits(
    folders: tuple[Path, Path], text: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    """Nearer to the 16-bit model, and the same in every command."""
    source, out = folders
    if not out.exists():
        options = ("--calib", text, "--samples", 4, "--seqlen", 48)
        assert resq("quantize", source, out, *options).code == 0
    found: dict[object, Any] = {}
    for bits in (None, 4, 8):
        target, extra = tmp_path / f"{bits}.json", () if bits is None else ("--lo-bits", bits)
        options = ("--text", text, "--reference", source, "--json", target, *extra)
        result = resq("eval", out, *options)
        assert result.code == 0, result.err
        assert f"low part in {bits or 4} bits" in result.out
        found[bits] = json.loads(target.read_text())
        assert found[bits]["lo_bits"] == (bits or 4)
        assert resq("compare", out, *options).code == 0
        compared = json.loads(target.read_text())["folders"][0]
        assert compared["kl_to_reference"] == pytest.approx(found[bits]["kl_to_reference"], 1e-9)
        assert compared["bits"]["activations"] == ([4, 8] if bits != 8 else [8])
        assert compared["quantization"]["lo_bits"] == (bits or 4)
    assert found[None]["kl_to_reference"] == found[4]["kl_to_reference"]
    assert found[8]["kl_to_reference"] < 0.7 * found[4]["kl_to_reference"]
    fake = tmp_path / "fake.json"
    result = resq("eval", out, *options[:4], "--json", fake, "--lo-bits", 8, "--fake-quant")
    assert result.code == 0, result.err
    # Codes that round to the other side of a tie move a KL this small, but not to that of 4 bits.
    four, eight = (found[bits]["kl_to_reference"] for bits in (4, 8))
    assert abs(json.loads(fake.read_text())["kl_to_reference"] - eight) < 0.3 * (four - eight)

    generated = resq("generate", out, "--prompt", PROMPT, "--max-new-tokens", 12, "--lo-bits", 8)
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")
    model = from_pretrained(out, lo_bits=8)
    tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert generated.out == byte_tokenizer().decode(tokens[0], skip_special_tokens=True) + "\n"


def test_lo_bits_needs_a_quantized_model(
    folders: tuple[Path, Path], text: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    source, other = folders[0], shutil.copytree(folders[0], tmp_path / "other")
    for command, options in (
        ("eval", (source, "--text", text)),
        ("generate", (source, "--prompt", PROMPT)),
        ("chat", (source,)),
        ("serve", (source,)),
        ("compare", (source, "--text", text, "--reference", other)),
    ):
        result = resq(command, *options, "--lo-bits", 8)
        assert result.code == 2, (command, result.err)
        assert result.sentence.startswith("--lo-bits: expected a"), result.sentence
        assert "quantized by resq" in result.sentence


def test_fake_quant_needs_a_quantized_model(
    folders: tuple[Path, Path], text: Path, resq: Callable[..., Result]
) -> None:
    result = resq("eval", folders[0], "--text", text, "--fake-quant")
    assert result.code == 2
    assert result.sentence.startswith("--fake-quant: expected a model quantized by resq")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("truncated", "model.safetensors"),
        ("newer", "format_version"),
        ("hash", "rotation: expected the hash"),
    ],
)
def test_damaged_folder_is_refused_in_a_sentence(
    folders: tuple[Path, Path],
    text: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    damage: str,
    sentence: str,
) -> None:
    out = tmp_path / "out"
    options = ("--calib", text, "--samples", 1, "--weights", "rtn")
    assert resq("quantize", folders[0], out, *options).code == 0
    weights, config = out / "model.safetensors", out / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-64])
    else:
        content = json.loads(config.read_text())
        key = "format_version" if damage == "newer" else "rotation_hash"
        content["quantization_config"][key] = 99 if damage == "newer" else "sha256:" + "0" * 64
        config.write_text(json.dumps(content))
    for command in (("eval", out, "--text", text), ("generate", out, "--prompt", "x")):
        result = resq(*command)
        assert result.code == 1
        assert sentence in result.sentence
