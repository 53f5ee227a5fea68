"""`resq quantize`: whole folders, documented keys, refusals before any work, resumption."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import POSITIONS, Result, save, tiny_llama
from transformers import GPT2Config

from resq_kernels import from_pretrained
from resq_kernels.commands import loading
from resq_kernels.commands.quantize import _advice
from resq_kernels.commands.sizes import part_sizes
from resq_kernels.config import ResQConfig

KEYS = {"layers", "bytes_before", "bytes_after", "seconds", "config"}
KEYS |= {"model", "windows", "seqlen", "spectra", "inputs", "files", "verdict"}
KEYS |= {"dialogues", "verdict_in_dialogues", "preset"}


def test_quantize_writes_a_whole_folder_and_the_documented_keys(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    out, target = tmp_path / "deep" / "out", tmp_path / "q.json"
    options = ("--samples", 4, "--seqlen", 48, "--seed", 3, "--json", target)
    result = resq("quantize", llama, out, "--calib", text_file, *options)
    assert result.code == 0, result.err
    figures = json.loads(target.read_text())
    assert set(figures) == KEYS
    assert figures == json.loads((out / "quantization_report.json").read_text())
    assert len(figures["layers"]) == 2 * 7
    for layer in figures["layers"]:
        assert set(layer) >= {"name", "rows", "columns", "error"}
        assert 0 < layer["error"] < 0.5
    expected = ResQConfig(samples=4, seqlen=48, dialogues=0, seed=3)
    assert figures["config"] == expected.to_dict() and figures["preset"] is None
    sizes = part_sizes(out)
    # Bytes of a row: q, k, v, gate, up 112 | 16 columns, o 224 | 32, down 160 | 32.
    rows = {112 // 2 + 16: 256 + 128 + 128 + 192 + 192, 224 // 2 + 32: 128, 160 // 2 + 32: 128}
    assert sizes["linears"] == 2 * sum(width * count for width, count in rows.items())
    assert sizes["linear_scales"] == 2 * sum(rows.values()) * 2 * 4
    of_linears = 2 * 128 + 2 * 32 + 2 * 64 * 64 + 2 * 192  # gains, key factors, U_B, factors, order
    assert sizes["rotations"] == 2 * 64 * 64 * 2 + 128 * 128 * 2 + 2 * of_linears * 4
    assert f"{out}" in result.out and "14 linears" in result.out
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    info = resq("info", out)
    assert info.code == 0
    assert "quant_method" in info.out and "resq" in info.out
    for name, value in figures["config"].items():  # also those that config.json does not have
        assert re.search(rf"^{name} +{re.escape(str(value))}$", info.out, re.M), name


def test_a_preset_is_its_fields_spelled_out(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    """The same bits; report, page, card, `info` and `compare` name it; options override it."""
    chat = shutil.copytree(llama, tmp_path / "chat")  # a template, so that dialogues are possible
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    text = ("--calib", text_file, "--samples", 4, "--seqlen", 32, "--held-out", 0)
    spelled = ("--bases", "principal", "--token-weights", "uniform", "--hessian-inputs", "exact")
    spelled += ("--hadamard-block", 0, "--activation-clip", 1, "--embedding-bits", 16)
    spelled += ("--dialogues", 0)
    for weights in ("gptq", "rtn"):
        outs = [tmp_path / f"{name}-{weights}" for name in ("preset", "spelled")]
        for out, options in zip(outs, (("--preset", "paper"), spelled), strict=True):
            result = resq("quantize", chat, out, *text, *options, "--weights", weights)
            assert result.code == 0, result.err
            report = json.loads((out / "quantization_report.json").read_text())
            assert report["preset"] == "paper" and report["dialogues"] == 0
            for name in ("quantization_report.html", "README.md"):
                words = (out / name).read_text().lower()
                assert "preset" in words and "paper" in words
            assert "if no activation were rounded" in (out / "quantization_report.html").read_text()
        files = ("model.safetensors", "config.json")
        assert all((outs[0] / f).read_bytes() == (outs[1] / f).read_bytes() for f in files)
        stored = json.loads((outs[0] / "config.json").read_text())["quantization_config"]
        assert not {"preset", "bases", "token_weights", "hessian_inputs"} & set(stored)
        assert from_pretrained(outs[0]).lm_head.weight.shape == (320, 128)
    info = resq("info", outs[0])
    assert re.search("^preset +paper$", info.out, re.M)
    compared = resq("compare", *outs, "--reference", chat, "--text", text_file, "--seqlen", 32)
    assert compared.code == 0, compared.err
    assert compared.out.count("resq, rtn, preset paper") == 2

    other = tmp_path / "other"
    result = resq("quantize", chat, other, *text, "--preset", "paper", "--embedding-bits", 8)
    assert result.code == 0, result.err
    report = json.loads((other / "quantization_report.json").read_text())
    paper = ResQConfig.from_preset("paper", embedding_bits=8, samples=4, seqlen=32)
    assert report["config"] == paper.to_dict() and report["preset"] is None
    refused = resq("quantize", chat, tmp_path / "no", *text, "--preset", "paper", "--method", "rtn")
    assert refused.code == 2 and "bases: method 'rtn' has none" in refused.sentence


def test_the_verdict_is_in_the_table_the_page_and_the_card(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    windows = {}
    for name, options in {
        "default": (),
        "two": ("--held-out", 2),
        "none": ("--held-out", 0),
    }.items():
        out = tmp_path / name
        options = (*options, "--samples", 4, "--seqlen", 32, "--weights", "rtn")
        result = resq("quantize", llama, out, "--calib", text_file, *options)
        assert result.code == 0, result.err
        verdict = json.loads((out / "quantization_report.json").read_text())["verdict"]
        windows[name] = verdict and verdict["windows"]
        page = (out / "quantization_report.html").read_text()
        for words in (result.out, page):
            assert ("verdict" in words) and (("KL to 16-bit" in words) is (name != "none"))
        assert ("KL to 16-bit" in (out / "README.md").read_text()) is (name != "none")
        if verdict:
            assert f"{verdict['grade']} the 16-bit model" in result.out
    assert windows == {"default": 4, "two": 2, "none": None}
    again = resq(
        *("quantize", llama, tmp_path / "two", "--calib", text_file, "--resume", "--held-out", 3),
        *("--samples", 4, "--seqlen", 32, "--weights", "rtn"),
    )
    assert again.code == 1 and "the held-out tokens differ" in again.sentence


@pytest.mark.parametrize(
    ("grade", "changed", "words"),
    [
        ("close to", {}, ""),
        ("much worse than", {}, "--distill-epochs 1"),
        ("much worse than", {"lo_bits": 8, "distill_epochs": 2}, ""),
        ("much worse than", {"method": "rtn", "lo_bits": 8}, "--method resq, --distill-epochs 1"),
    ],
)
def test_a_bad_verdict_says_what_to_try(grade: str, changed: dict, words: str) -> None:
    bad, good = {"grade": grade}, {"grade": "as good as"}
    for verdicts in ((bad, None), (bad, good), (good, bad), (None, bad)):
        report = dict(zip(("verdict", "verdict_in_dialogues"), verdicts, strict=True))
        report["config"] = ResQConfig(**changed).to_dict()
        assert _advice(report) == ([("to come nearer", words)] if words else [])
        report |= {"verdict": None, "verdict_in_dialogues": good}
        assert _advice(report) == []


def test_dialogues_of_a_chat_model(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    """A quarter of the windows by default, others by number; the same ones in every run."""
    source = shutil.copytree(llama, tmp_path / "chat")
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + m['content'] + '<|endoftext|>' }}{% endfor %}"
    )
    options = ("--calib", text_file, "--samples", 4, "--seqlen", 32, "--held-out", 2)
    weights = []
    for name, more, count in (
        ("default", (), 1),
        ("one", ("--dialogues", 1), 1),
        ("three", ("--dialogues", 3), 3),
        ("none", ("--dialogues", 0), 0),
    ):
        out = tmp_path / name
        result = resq("quantize", source, out, *options, *more)
        assert result.code == 0, result.err
        report = json.loads((out / "quantization_report.json").read_text())
        assert (report["windows"], report["dialogues"]) == (4, count)
        assert report["config"]["dialogues"] == count
        verdict = report["verdict_in_dialogues"]
        assert (verdict and verdict["windows"]) == (2 if count else None)
        assert ("KL in dialogues" in result.out) is (count > 0)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] and len(set(weights)) == 3
    for model, number, words in (
        (source, 4, "dialogues: expected fewer than the 4 samples, got 4"),
        (llama, 1, "dialogues: expected 0, got 1: the tokenizer has no chat template"),
    ):
        result = resq("quantize", model, tmp_path / "refused", *options, "--dialogues", number)
        assert result.code != 0 and words in result.sentence
        assert not list(tmp_path.glob("refused*"))


def test_methods_reach_the_folder(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    for method, weights in (("rtn", "rtn"), ("quarot", "gptq"), ("quik", "gptq")):
        out = tmp_path / method
        options = ("--method", method, "--weights", weights, "--samples", 2, "--kv-bits", 16)
        result = resq("quantize", llama, out, "--calib", text_file, *options)
        assert result.code == 0, result.err
        stored = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (stored["method"], stored["weights"], stored["kv_bits"]) == (method, weights, 16)
        assert stored["high_fraction"] == (0.125 if method == "quik" else 0.0)
        sizes = re.search(r"^rotations +[\d.]+ k?B$", resq("info", out).out, re.M)
        assert (sizes is not None) == (method != "rtn")


def test_learned_rotations_reach_the_folder(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    out, text = tmp_path / "out", ("--calib", text_file, "--samples", 2, "--seqlen", 32)
    steps = ("--preset", "spinquant", "--rotation-steps", 3, "--rotation-lr", 0.5)
    result = resq("quantize", llama, out, *text, *steps)
    assert result.code == 0, result.err
    assert re.search(r"^rotations +3 steps, loss \d\.\d+ in the first 2, ", result.out, re.M)
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["preset"] == "spinquant" and len(report["learning"]) == 3
    assert set(report) == {*KEYS, "learning"} - {"spectra"}
    assert report["config"]["rotation_lr"] == 0.5
    assert "3 steps, loss" in (out / "quantization_report.html").read_text()
    options = ("--reference", llama, "--text", text_file, "--seqlen", 32, "--max-windows", 2)
    compared = resq("compare", out, *options)
    assert "quarot, gptq, preset spinquant, learned rotations" in compared.out
    for more, words in (
        (("--method", "rtn", "--rotations", "learned"), "method 'rtn' has none to learn, expected"),
        (("--rotation-steps", 3), "rotation_steps: expected None with rotations 'random', which"),
        (("--rotation-lr", 1), "rotation_lr: expected None with rotations 'random', which are"),
    ):
        refused = resq("quantize", llama, tmp_path / "refused", *text, *more)
        assert refused.code == 2 and words in refused.sentence
        assert not list(tmp_path.glob("refused*"))


def test_the_block_reaches_the_folder(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    options = ("--calib", text_file, "--samples", 2, "--weights", "rtn", "--held-out", 0)
    for block, high in ((0, 0), (16, 32)):
        out = tmp_path / str(block)
        result = resq("quantize", llama, out, *options, "--hadamard-block", block)
        assert result.code == 0, result.err
        stored = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (stored["hadamard_block"], stored["format_version"]) == (block, 6)
        mlp = from_pretrained(out).model.layers[0].mlp
        assert (mlp.hadamard_block, mlp.down_proj.row_format.k_hi) == (block, high)
    for more, words in (
        ((24,), "invalid choice: 24"),
        ((8, "--method", "rtn"), "expected 0, got 8"),
    ):
        result = resq("quantize", llama, tmp_path / "no", *options, "--hadamard-block", *more)
        assert result.code == 2 and words in result.err
    assert not list(tmp_path.glob("no*"))


def test_few_windows_are_a_warning(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    result = resq("quantize", llama, tmp_path / "out", "--calib", text_file, "--samples", 1000)
    assert result.code == 0
    (warning,) = [line for line in result.err.splitlines() if "warning" in line]
    assert warning.startswith("resq: warning: calibration text: ")


def test_what_cannot_be_quantized_is_refused_and_nothing_is_written(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    other = tmp_path / "gpt2"
    GPT2Config(n_layer=1).save_pretrained(other)
    short = tmp_path / "short.txt"
    short.write_text("short")
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((llama / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    existing = tmp_path / "existing"
    existing.mkdir()
    blocked = tmp_path / "short.txt" / "below"
    calib = ("--calib", text_file)
    for arguments, code, sentence in (
        ((tmp_path / "none", out, *calib), 1, "there is no such folder"),
        ((other, out, *calib), 1, "smollm3, got 'gpt2'"),
        ((quantized, out, *calib), 1, "expected a 16-bit model, got one that is already quantized"),
        ((llama, existing, *calib), 1, "expected a new folder, but it exists"),
        ((llama, blocked, *calib), 1, "cannot write to"),
        ((llama, out, "--calib", short), 1, f"expected at least {POSITIONS} tokens"),
        ((llama, out, "--calib", tmp_path / "no.txt"), 1, "does not exist"),
        ((llama, out, *calib, "--seqlen", POSITIONS + 1), 2, f"expected at most {POSITIONS}"),
        ((llama, out, *calib, "--seqlen", 1), 2, "at least 2, got '1'"),
        ((llama, out, *calib, "--samples", 0), 2, "at least 1, got '0'"),
        ((llama, out, *calib, "--method", "awq"), 2, "invalid choice: 'awq'"),
        ((llama, out, *calib, "--kv-bits", 3), 2, "invalid choice: 3"),
        ((llama, out, *calib, "--high-fraction", 2), 2, "expected a number in [0, 1], got '2'"),
        ((llama, out, *calib, "--high-fraction", 0.3), 1, "must be a whole number"),
        (
            (llama, out, *calib, "--method", "rtn", "--high-fraction", 0.25),
            2,
            "method 'rtn' is uniform 4-bit",
        ),
    ):
        before = sorted(tmp_path.rglob("*"))
        result = resq("quantize", *arguments)
        assert (result.code, sentence in result.sentence) == (code, True), result.err
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_without_wikitext_it_is_said_before_any_work(
    llama: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.delenv("RESQ_WIKITEXT2", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("load_tokenizer", "load_model"):
        monkeypatch.delattr(loading, name)
    option = "--calib" if command == "quantize" else "--text"
    result = resq(command, llama, *[tmp_path / "out"] * (command == "quantize"))
    assert result.code == 1
    assert (
        f"`pip install 'resq_kernels[datasets]'`, or give a text with `{option} FILE`"
        in result.sentence
    )


@pytest.mark.usefixtures("sigint")
def test_interrupted_run_is_resumed_to_the_same_bytes(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    model = save(tiny_llama(num_hidden_layers=6), tmp_path / "model")
    options = ["--calib", str(text_file), "--samples", "4", "--seqlen", "64", "--threads", "1"]
    assert resq("quantize", model, tmp_path / "whole", *options).code == 0

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-m", "resq_kernels", "quantize", str(model), str(out), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any(partial.glob("quantize-*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "resq: interrupted" in errors and f"{partial} (--resume)" in errors
    assert partial.is_dir() and not out.exists()

    again = resq("quantize", model, out, *options)
    assert again.code == 1
    assert str(partial) in again.sentence
    assert resq("quantize", model, out, *options, "--resume").code == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("kind", ["truncated", "nan"])
def test_damaged_source_is_refused(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result], kind: str
) -> None:
    model = tiny_llama()
    if kind == "nan":
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    folder = save(model, tmp_path / "model")
    if kind == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    result = resq("quantize", folder, tmp_path / "out", "--calib", text_file, "--samples", 2)
    assert result.code == 1
    named = "model.safetensors" if kind == "truncated" else "layers.1.mlp.up_proj.weight"
    assert named in result.sentence
    assert not (tmp_path / "out").exists()
