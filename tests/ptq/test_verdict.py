"""The verdict of the report, against transformers running both folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_models import MODELS
from transformers import AutoModelForCausalLM

from resq_kernels.api import from_pretrained
from resq_kernels.config import ResQConfig
from resq_kernels.evaluate import Measured, WindowSums, measure
from resq_kernels.ptq import verdict as module
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.verdict import GRADES, LOST, grade, verdict_facts
from resq_kernels.safetensors_io import CheckpointReader, save_tensors
from resq_kernels.testing.tiny_models import save_tiny_model

CONFIGS = {
    "resq": {},
    "resq-16-bit-vocabulary": {"embedding_bits": 16, "lo_bits": 8},
    "quarot": {"method": "quarot"},
    "quik": {"method": "quik"},
    "rtn": {"method": "rtn", "weights": "rtn", "kv_bits": 16},
    "distilled": {"distill_epochs": 1},
}


def measured(
    source: Path, out: Path, windows: torch.Tensor, lo_bits: int | None = None
) -> tuple[Measured, Measured]:
    """Both folders by transformers in float32, our module inside."""
    models = {
        "reference": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        "model": from_pretrained(out, lo_bits=lo_bits, dtype=torch.float32),
    }
    found = measure(models, windows)
    return found["reference"], found["model"]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("resq", name) for name in ("llama", "llama-tied-rope", "qwen2", "qwen2-tied-bf16")),
        *(("resq-16-bit-vocabulary", name) for name in ("llama", "qwen2-tied-bf16")),
        *((m, name) for m in ("quarot", "quik") for name in ("llama-tied-rope", "qwen2")),
        *(("rtn", name) for name in ("llama", "llama-tied-rope")),
        ("distilled", "qwen2-tied-bf16"),
    ],
)
def test_it_is_what_transformers_measures(
    tmp_path: Path, tokens: torch.Tensor, name: str, method: str
) -> None:
    """Up to the order of sums: 2e-6 of KL was seen in 26 runs, a layer that is left out halves it.

    Where the source is bfloat16 its products are, where instructions for them exist, so the
    reference moves: KL by up to 5 %, most in tied models, which are sure of every token.
    """
    source = save_tiny_model(tmp_path / "in", **MODELS[name])
    out, config = tmp_path / "out", ResQConfig(**CONFIGS[method])
    held_out = torch.randint(0, 256, (12, 70))  # longer than those of the calibration
    report = quantize_folder(source, out, tokens, config, held_out=held_out, progress=False)
    found, (exact, rounded) = report["verdict"], measured(source, out, held_out)
    bfloat16 = MODELS[name].get("dtype") == torch.bfloat16
    same = 0.03 if bfloat16 else 1e-5
    assert math.log(found["reference_perplexity"]) == pytest.approx(
        math.log(exact.perplexity), rel=1e-2 if bfloat16 else 1e-5
    )
    assert math.log(found["perplexity"]) == pytest.approx(math.log(rounded.perplexity), rel=same)
    assert found["kl_to_reference"] == pytest.approx(rounded.kl, rel=0.24 if bfloat16 else 1e-5)
    assert found["top1_agreement"] == pytest.approx(rounded.top1, abs=same)
    assert found["windows"] == 12 and found["seqlen"] == 70


def test_eight_bits_are_measured_too(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """They are what transformers finds of the folder loaded so, and the folder's own if it is for
    8 bits."""
    held_out, config = torch.randint(0, 256, (12, 70)), ResQConfig(activation_clip=0.8)
    arguments = {"held_out": held_out, "progress": False}
    report = quantize_folder(llama, tmp_path / "out", tokens, config, **arguments)
    found, wide = report["verdict"], report["verdict"]["with_lo_bits_8"]
    assert wide.keys() == found.keys() - {"with_lo_bits_8"}
    _, rounded = measured(llama, tmp_path / "out", held_out, lo_bits=8)
    assert wide["kl_to_reference"] == pytest.approx(rounded.kl, rel=1e-5)
    assert wide["kl_to_reference"] < 0.8 * found["kl_to_reference"]
    assert wide["reference_perplexity"] == found["reference_perplexity"]
    config = ResQConfig(lo_bits=8)
    report = quantize_folder(llama, tmp_path / "wide", tokens, config, **arguments)
    assert report["verdict"]["with_lo_bits_8"] is None


def test_figures_and_their_intervals() -> None:
    exact = Measured([WindowSums(10.0, 0.0, 10), WindowSums(20.0, 0.0, 10)], 10, 0.0)
    rounded = Measured([WindowSums(11.0, 2.0, 8), WindowSums(24.0, 4.0, 7)], 10, 0.0)
    found = module._figures(exact, rounded)
    t = 12.706  # Student's, for one degree of freedom; times s / sqrt(2) = |a - b| / 2
    assert found == {
        "grade": grade(0.3),
        "windows": 2,
        "seqlen": 11,
        "reference_perplexity": pytest.approx(math.exp(1.5)),
        "perplexity": pytest.approx(math.exp(1.75)),
        "gap": pytest.approx(0.25),
        "gap_interval": pytest.approx(t * 0.15, rel=1e-4),
        "kl_to_reference": pytest.approx(0.3),
        "kl_interval": pytest.approx(t * 0.1, rel=1e-4),
        "top1_agreement": pytest.approx(0.75),
        "top1_interval": pytest.approx(t * 0.05, rel=1e-4),
    }


def test_without_windows_there_is_none(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    config = ResQConfig(weights="rtn")
    for number, held_out in enumerate((None, tokens[:0], tokens[:, :1])):
        out = tmp_path / str(number)
        report = quantize_folder(llama, out, tokens, config, held_out=held_out, progress=False)
        assert report["verdict"] is None
        assert [name for name, _ in verdict_facts(report)] == ["verdict"]


def test_held_out_tokens_are_checked(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    for wrong, words in (
        (tokens + 10**6, "token ids from 0 to 319"),
        (tokens.int(), "got int32"),
        (tokens[0], r"\[48\]"),
    ):
        with pytest.raises(ValueError, match=f"held_out: .*{words}"):
            quantize_folder(llama, tmp_path / "out", tokens, held_out=wrong, progress=False)
        assert not list(tmp_path.glob("out*"))


def test_other_windows_are_another_run(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    out, config = tmp_path / "out", ResQConfig(weights="rtn")
    arguments = {"config": config, "resume": True, "progress": False}
    report = quantize_folder(llama, out, tokens, held_out=tokens[:2], **arguments)
    assert quantize_folder(llama, out, tokens, held_out=tokens[:2], **arguments) == report
    with pytest.raises(FileExistsError, match="other inputs: the held-out tokens differ;"):
        quantize_folder(llama, out, tokens, held_out=tokens[:3], **arguments)


def test_weights_do_not_depend_on_it(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    files = []
    for name, held_out in (("a", None), ("b", tokens)):
        quantize_folder(llama, tmp_path / name, tokens, held_out=held_out, progress=False)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_ruined_model_gets_a_verdict_too(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that are not finite are null, in JSON that others read."""

    def ruined(*arguments: Any) -> Any:
        folder = arguments[1]
        reader = CheckpointReader(folder)
        tensors = {name: reader.load(name) for name in reader.tensors}
        tensors["lm_head.weight_scale"].fill_(math.nan)
        save_tensors(folder / "model.safetensors", tensors)
        return real(*arguments)

    real = module.verdicts
    monkeypatch.setattr("resq_kernels.ptq.pipeline.verdicts", ruined)
    out = tmp_path / "out"
    report = quantize_folder(llama, out, tokens, held_out=tokens, progress=False)
    found = report["verdict"]
    assert found["grade"] == LOST and found["kl_to_reference"] is None
    assert found["perplexity"] is None and found["reference_perplexity"] > 1
    assert "NaN" not in (out / "quantization_report.json").read_text()
    facts = dict(verdict_facts(report))
    assert facts["verdict"] == "useless beside the 16-bit model"
    assert facts["perplexity"].endswith("-> not finite")


def test_perplexity_beyond_the_largest_number() -> None:
    sums = Measured([WindowSums(1e6, 1e6, 0)], 10, 0.0)
    assert sums.perplexity == math.inf


def test_grades_get_worse_with_the_divergence() -> None:
    limits = [limit for limit, _ in GRADES]
    assert limits == sorted(limits)
    assert [grade(limit * 0.99) for limit in limits] == [words for _, words in GRADES]
    assert [grade(limit) for limit in limits] == [*(words for _, words in GRADES[1:]), LOST]
    assert grade(0.0) == GRADES[0][1] and grade(math.nan) == grade(math.inf) == LOST


def test_facts() -> None:
    found = {
        "grade": "close to",
        "windows": 4,
        "seqlen": 512,
        "reference_perplexity": 10.0,
        "perplexity": 10.5,
        "gap": math.log(1.05),
        "gap_interval": 0.01,
        "kl_to_reference": 0.0512,
        "kl_interval": 0.0049,
        "top1_agreement": 0.891,
        "top1_interval": 0.01,
    }
    text = [
        ("verdict", "close to the 16-bit model"),
        ("KL to 16-bit", "0.051 +- 0.005 nats, same likeliest token 89.1%"),
        ("perplexity", "10.00 -> 10.50 (+5.0%)"),
        ("measured on", "4 held-out windows of 512 tokens"),
    ]
    wide = {**found, "kl_to_reference": 0.01, "perplexity": 10.1, "gap": math.log(1.01)}
    both = {**found, "with_lo_bits_8": wide}
    row = "KL 0.010 +- 0.005 nats, same likeliest token 89.1%, perplexity 10.10 (+1.0%)"
    one = {**found, "grade": "much worse than", "windows": 1, "kl_interval": None}
    dialogues = [
        ("in dialogues", "much worse than the 16-bit model, which wrote them"),
        ("KL in dialogues", "0.051 nats, same likeliest token 89.1%"),
    ]
    for verdicts, expected in (
        ((found, None), text),
        ((found, one), text + dialogues),
        ((None, one), dialogues),
        ((both, None), [*text[:3], ("with --lo-bits 8", row), text[3]]),
        ((None, {**one, "with_lo_bits_8": None}), dialogues),
        (
            (None, {**both, "grade": "much worse than", "kl_interval": None}),
            [*dialogues, ("and --lo-bits 8", row)],
        ),
    ):
        keys = ("verdict", "verdict_in_dialogues")
        assert verdict_facts(dict(zip(keys, verdicts, strict=True))) == expected
