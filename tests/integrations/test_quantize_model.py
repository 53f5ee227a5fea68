"""`resq_kernels.quantize`: the models, tokenizers and texts it takes; what it leaves alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)
from transformers.utils import logging

import resq_kernels
from resq_kernels import ResQConfig
from resq_kernels.nn.generation import generating_class
from resq_kernels.testing.tiny_models import make_model, make_tokenizer

IDS = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(3))
TEXT = "The quick brown fox jumps over the lazy dog. " * 20
CONFIG = ResQConfig(method="rtn", weights="rtn", samples=2, seqlen=32)


def quantize(model: Any, calibration: Any = TEXT, config: Any = CONFIG, **more: Any) -> Any:
    options = {"progress": False} | more
    return resq_kernels.quantize(model, make_tokenizer(), calibration, config, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Logits of `make_model()`, quantized."""
    return logits(quantize(make_model()))


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def training(model: Any) -> Any:
    return model.train()


def hooked(model: Any) -> Any:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def refused_settings(model: Any) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, eos_token_id=256)
    with pytest.raises(ValueError, match="GenerationConfig` is invalid|temperature"):
        model.generation_config.validate(strict=True)
    return model


def merged(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).merge_and_unload()


@pytest.mark.parametrize(
    "change", [compiled, compiled_in_place, training, hooked, refused_settings, merged]
)
def test_models_against_which_nothing_stands(
    expected: torch.Tensor, change: Callable[[Any], Any]
) -> None:
    plain = make_model()
    model = change(plain)
    settings, mode = copy.deepcopy(plain.config.to_dict()), plain.training
    generation = copy.deepcopy(plain.generation_config)
    quantized = quantize(model)
    assert type(quantized) is generating_class(type(plain)) and not quantized.training
    assert torch.equal(logits(quantized), expected)
    assert quantized.generation_config == generation == plain.generation_config
    assert quantized.generation_config is not plain.generation_config
    assert (plain.config.to_dict(), plain.training) == (settings, mode)


@pytest.mark.parametrize("words", [263, 400])
def test_a_resized_embedding(words: int) -> None:
    model = make_model()
    model.resize_token_embeddings(words)
    quantized = quantize(model)
    assert quantized.config.vocab_size == words
    error = (logits(quantized) - logits(model)).norm() / logits(model).norm()
    assert logits(quantized).shape == (2, 14, words) and error < 0.5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("error:.*tie_word_embeddings")
def test_the_head_is_the_model_s_whatever_its_configuration_says(tied: bool) -> None:
    model = make_model(tie_word_embeddings=not tied)
    head = model.model.embed_tokens.weight if tied else model.lm_head.weight.detach().clone() * 2
    model.lm_head.weight = head if tied else torch.nn.Parameter(head)
    quantized = quantize(model)
    assert (logits(quantized) - logits(model)).norm() / logits(model).norm() < 0.5


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def offloaded(model: Any) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(model) or model


def never_loaded(model: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def cut(model: Any) -> Any:
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(300, 128))
    return model


def not_finite(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    return model


def other(model: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=1, vocab_size=300))


def small(model: Any) -> Any:
    model.resize_token_embeddings(100)
    model.config.pad_token_id = None  # of a token that it no longer has
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (adapted, "model: expected a model of transformers, got PeftModel; merge its adapters"),
        (
            lambda m: adapted(m) and m,
            "model: expected a model without adapters, got model.layers.0",
        ),
        (offloaded, "model: expected weights in memory, got model.embed_tokens.weight on the meta"),
        (never_loaded, "model: expected weights in memory, got model.embed_tokens.weight on the m"),
        (
            lambda m: m.model,
            "model: expected a causal language model with .*, got LlamaModel; load",
        ),
        (
            lambda m: LlamaForSequenceClassification(m.config),
            "model: expected a causal language model with .*, got LlamaForSequenceClassification;",
        ),
        (other, "model: config.json: model_type: expected one of llama, .*, got 'gpt2'"),
        (torch.nn.DataParallel, "model: expected a model of transformers, got DataParallel; pass"),
        (lambda m: "a/name", "model: expected a model of transformers, got str; pass the model"),
        (cut, r"model: model.embed_tokens.weight: expected .*\[320, 128\], got .*\[300, 128\]"),
        (not_finite, "model: model.layers.1.mlp.up_proj.weight: expected finite values, got 1"),
        (small, r"tokenizer: expected ids below 100 \(the model's vocab_size\), got 220;"),
    ],
)
def test_models_that_are_refused(change: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^quantize: {sentence}") as caught:
        quantize(change(make_model()))
    assert "/tmp" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize(
    "calibration",
    [
        [TEXT[:400], TEXT[400:]],
        (TEXT[:400], TEXT[400:]),
        (part for part in (TEXT[:400], TEXT[400:])),
        [{"text": TEXT[:400], "id": 1}, {"text": TEXT[400:], "id": 2}],
        ({"text": TEXT} for _ in range(1)),
    ],
    ids=["list", "tuple", "generator", "rows", "generator of rows"],
)
def test_texts_as_one_text(calibration: Any) -> None:
    config = ResQConfig(weights="gptq", method="rtn", samples=4, seqlen=32)
    got, wanted = quantize(make_model(), calibration, config), quantize(make_model(), TEXT, config)
    for (name, tensor), other in zip(
        got.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_bars_are_shown_if_they_are_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()  # commands that ran in this process switch them off
    for wanted in (True, False, True):
        capfd.readouterr()
        quantize(make_model(), progress=wanted)
        err = capfd.readouterr().err
        assert ("Loading weights" in err, "quantize" in err) == (wanted, wanted)


def test_the_report_is_that_of_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "reports"
    quantize(make_model(), report=folder)
    assert {path.name for path in folder.iterdir()} == {
        "quantization_report.json",
        "quantization_report.html",
    }
    report = json.loads((folder / "quantization_report.json").read_text())
    assert report["model"] == "LlamaForCausalLM"
    assert report["config"] == {**CONFIG.to_dict(), "dialogues": 0}
    assert len(report["layers"]) == 14 and all(0 < r["error"] < 0.5 for r in report["layers"])
    assert "tmp" not in json.dumps(report)
    assert report["verdict"]["windows"] == 4  # the text has more
    for held_out in (0, 1):
        quantize(make_model(), report=folder, held_out=held_out)
        verdict = json.loads((folder / "quantization_report.json").read_text())["verdict"]
        assert (verdict and verdict["windows"]) == (held_out or None)
    for wrong, words in ((-1, "-1"), (True, "True"), ("4", "'4'"), (2.0, "2.0")):
        with pytest.raises(
            ValueError, match=f"held_out: expected a number of windows, got {words}"
        ):
            quantize(make_model(), report=folder, held_out=wrong)
    with pytest.raises(ValueError, match="held_out: expected None or 0 without report.* got 2"):
        quantize(make_model(), held_out=2)
    quantize(make_model(), held_out=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="^quantize: report: expected a folder, got the file"):
        quantize(make_model(), report=tmp_path / "file")


def test_a_chat_model_writes_some_of_the_windows(tmp_path: Path) -> None:
    """In the template of the tokenizer that is passed, without a bar or a line on stderr."""
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] + '<|endoftext|>' }}{% endfor %}"
    )
    options = {"report": tmp_path, "progress": False}
    for config, count in (
        (ResQConfig(samples=5, seqlen=32), 1),
        (ResQConfig(samples=5, seqlen=32, dialogues=4), 4),
        (ResQConfig(samples=5, seqlen=32, dialogues=0), 0),
    ):
        resq_kernels.quantize(model, tokenizer, TEXT, config, **options)
        report = json.loads((tmp_path / "quantization_report.json").read_text())
        assert (report["windows"], report["dialogues"]) == (5, count)
        assert report["config"]["dialogues"] == count
        verdict = report["verdict_in_dialogues"]
        assert (verdict and verdict["windows"]) == (4 if count else None)
    with pytest.raises(ValueError, match="^dialogues: expected 0, got 3: the tokenizer has no cha"):
        quantize(make_model(), config=ResQConfig(samples=5, seqlen=32, dialogues=3))


def test_calibration_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calib.txt"
    path.write_text("text " * 100)
    model, config = make_model("llama"), ResQConfig(weights="rtn", samples=2, seqlen=16)
    for calibration, words in (
        (path, "got PosixPath"),
        (str(path), "got the name of a file"),
        ([[1, 2, 3]], "got an item of type list"),
        ([{"messages": "x"}], "got an item of type dict"),
        ({"text": ["x"]}, "got dict"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"quantize: calibration: expected .* {words}"):
            resq_kernels.quantize(model, make_tokenizer(), calibration, config)
    with pytest.raises(ValueError, match="quantize: tokenizer: expected a tokenizer, got None"):
        resq_kernels.quantize(model, None, ["x"], config)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"samples": 2}, r"config: expected a ResQConfig, got dict; pass ResQConfig\("),
        (ResQConfig(seqlen=513), "config: seqlen: expected at most 512 .*_embeddings\\), got 513"),
    ],
)
def test_options_that_are_refused(config: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^quantize: {sentence}"):
        quantize(make_model(), config=config)


def test_windows_are_no_longer_than_the_model_s_positions(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="windows of 64 instead of 128"):
        quantize(make_model(max_position_embeddings=64), config=None, report=tmp_path)
    figures = json.loads((tmp_path / "quantization_report.json").read_text())
    assert (figures["seqlen"], figures["windows"]) == (64, len(TEXT) // 64)
    assert figures["config"]["seqlen"] == 64
