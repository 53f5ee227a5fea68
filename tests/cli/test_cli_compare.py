"""`resq compare`: its figures are those of `resq eval`, its intervals those computed by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import POSITIONS, Result, byte_tokenizer, save, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resq_kernels.commands import compare, comparison, loading
from resq_kernels.commands.output import UsageError
from resq_kernels.config import ResQConfig
from resq_kernels.evaluate import Measured, WindowSums, cut_windows, measure
from resq_kernels.safetensors_io import read_json, write_json
from resq_kernels.testing.quantized_models import random_quantized

REPORT = "quantization_report.json"
FIGURES = {
    "perplexity",
    "gap",
    "gap_interval",
    "kl_to_reference",
    "kl_interval",
    "kl_difference",
    "kl_difference_interval",
    "top1_agreement",
    "top1_interval",
    "layer_error",
}
OF_A_MODEL = {"model", "method", "bits", "dtype", "quantization", "bytes", "seconds", "window_loss"}
OF_A_FOLDER = {*OF_A_MODEL, *FIGURES, "layers", "window_kl", "window_top1"}
KEYS = {"reference", "text", "tokens", "seqlen", "windows", "level", "folders", "seeds"}


def report_of(options: ResQConfig, error: float) -> dict[str, Any]:
    """What compare reads of a report: two layers, the second with twice the error."""
    layers = [
        {"name": f"model.layers.{layer}.{linear}", "rows": 1, "columns": 1, "error": error * factor}
        for layer, factor in ((0, 1.0), (1, 2.0))
        for linear in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return {"layers": layers, "config": options.to_dict(), "inputs": {"files": {"a": "sha256:0"}}}


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized folders: `s0`, `s1`, `s2` of three seeds, `rtn` without a report."""
    work = tmp_path_factory.mktemp("compare")
    made = {f"s{seed}": ResQConfig(weights="rtn", seed=seed, distill_epochs=1) for seed in range(3)}
    made["rtn"] = ResQConfig(method="rtn", weights="rtn")
    for name, options in made.items():
        model = random_quantized(
            "llama", options, seed=options.seed, max_position_embeddings=POSITIONS
        )
        save(model, work / name)
        if name != "rtn":
            write_json(work / name / REPORT, report_of(options, 0.1 * (1 + options.seed)))
    return work


@pytest.fixture(scope="session")
def figures(work: Path, llama: Path, text_file: Path) -> dict[str, Any]:
    """JSON, HTML and stdout of one run over all folders, with --seeds."""
    from resq_kernels.cli import main

    folders = [str(work / name) for name in ("rtn", "s2", "s0", "s1")]
    options = ["--reference", llama, "--text", text_file, "--seqlen", 32, "--max-windows", 3]
    options += ["--seeds", "--json", work / "c.json", "--html", work / "c.html"]
    assert main(["compare", *folders, *map(str, options)]) == 0
    return json.loads((work / "c.json").read_text())


def test_figures_are_those_of_eval(
    figures: dict[str, Any],
    work: Path,
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
) -> None:
    names = ["rtn", "s2", "s0", "s1"]
    assert [found["model"] for found in figures["folders"]] == [str(work / n) for n in names]
    target = tmp_path / "eval.json"
    options = ("--text", text_file, "--seqlen", 32, "--max-windows", 3, "--json", target)
    for found in figures["folders"][:2]:
        assert resq("eval", found["model"], "--reference", llama, *options).code == 0
        alone = json.loads(target.read_text())
        for key in ("perplexity", "kl_to_reference", "top1_agreement"):
            assert found[key] == pytest.approx(alone[key], rel=1e-12)
        for key in ("tokens", "seqlen", "windows", "text"):
            assert figures[key] == alone[key]
        assert math.exp(statistics.fmean(found["window_loss"])) == pytest.approx(
            alone["perplexity"], rel=1e-12
        )
        assert statistics.fmean(found["window_kl"]) == found["kl_to_reference"] > 0
        assert statistics.fmean(found["window_top1"]) == pytest.approx(found["top1_agreement"])
    assert resq("eval", llama, *options).code == 0
    assert figures["reference"]["perplexity"] == json.loads(target.read_text())["perplexity"]


def test_a_window_is_measured_as_if_it_were_alone() -> None:
    reference, model = tiny_llama(0), tiny_llama(1)
    windows = cut_windows(torch.randint(1, 257, (96,)), 32)
    found = measure({"reference": reference, "model": model}, windows)
    for index, window in enumerate(windows):
        alone = measure({"reference": reference, "model": model}, window[None])
        for name in found:
            assert found[name].sums[index] == alone[name].sums[0]
    base = found["reference"]
    assert base.sums == measure({"alone": reference}, windows)["alone"].sums
    assert (base.divergences, base.agreements) == ([0.0] * 3, [1.0] * 3)


def measured(*divergences: float) -> Measured:
    """Of windows with two targets, losses ten times the divergences."""
    return Measured([WindowSums(20 * kl, 2 * kl, 1) for kl in divergences], 2, 1.0)


def folder(name: str, options: ResQConfig | None = None, **changes: Any) -> comparison.Folder:
    """A folder that was read, without files."""
    values = {"report": None, "layers": [], "bytes": None, "quantization": None} | changes
    return comparison.Folder(name=name, label=name, config=None, options=options, **values)


def seeded(seed: int, *divergences: float, method: str = "resq") -> comparison.Result:
    options = ResQConfig(method=method, seed=seed)
    return comparison.Result(folder(f"{method}-{seed}", options), measured(*divergences), "float32")


def test_intervals_over_windows_are_of_differences_in_each_window() -> None:
    """By hand, with t = 3.18244631 of three degrees of freedom."""
    windows = {"reference": (2.0, 4.0, 6.0, 8.0), "a": (3.0, 4.0, 8.0, 9.0), "b": (4, 6, 9, 11)}
    divergences = {"reference": (0, 0, 0, 0), "a": (0.1, 0.2, 0.3, 0.4), "b": (0.2, 0.2, 0.5, 0.5)}
    agreed = {"reference": (2, 2, 2, 2), "a": (0, 2, 2, 2), "b": (1, 1, 1, 1)}
    base, *results = (
        comparison.Result(
            folder(name),
            Measured([*map(WindowSums, windows[name], divergences[name], agreed[name])], 2, 1.0),
            "float32",
        )
        for name in windows
    )
    a, b = comparison.make_rows([[result] for result in results], base.measured)
    # Gaps 0.5, 0, 1, 0.5: squares of deviations from 0.5 sum to 0.5, s / sqrt(4) = sqrt(0.5 / 12).
    assert a.gap == (0.5, pytest.approx(3.18244631 * math.sqrt(0.5 / 12), rel=1e-8))
    # Gaps 1, 1, 1.5, 1.5: 0.25 around 1.25.
    assert b.gap == (1.25, pytest.approx(3.18244631 * math.sqrt(0.25 / 12), rel=1e-8))
    # KL 0.05, 0.1, 0.15, 0.2 around 0.125: 0.0125.
    half = 3.18244631 * math.sqrt(0.0125 / 12)
    assert a.kl == (pytest.approx(0.125), pytest.approx(half, rel=1e-8))
    # 0.05, 0, 0.1, 0.05 above the first: 0.005.
    half = 3.18244631 * math.sqrt(0.005 / 12)
    assert b.kl_difference == (pytest.approx(0.05), pytest.approx(half, rel=1e-8))
    assert a.kl_difference is None
    # Agreement 0, 1, 1, 1: 0.75.
    assert a.top1 == (0.75, pytest.approx(3.18244631 * math.sqrt(0.75 / 12), rel=1e-8))
    assert b.top1 == (0.5, 0.0)
    assert a.perplexity == pytest.approx(math.exp(24 / 8))


def test_intervals_over_seeds_are_those_of_their_means() -> None:
    reference = measured(0.0, 0.0)
    one = [seeded(0, 0.1, 0.3), seeded(1, 0.3, 0.5), seeded(2, 0.5, 0.7)]  # 0.2, 0.4, 0.6
    two = [seeded(seed, kl, kl, method="quarot") for seed, kl in enumerate((0.9, 0.8, 1.3))]
    other = [seeded(7, 0.2, 0.2, method="rtn")]
    rows = comparison.make_rows([one, two, other], reference, over_seeds=True)
    # s = 0.2, t of two degrees of freedom.
    assert rows[0].kl == (pytest.approx(0.4), pytest.approx(4.30265273 * 0.2 / math.sqrt(3)))
    assert rows[0].gap.mean == pytest.approx(4.0) and rows[0].kl_difference is None
    assert rows[0].perplexity == pytest.approx(math.exp(4.0))
    # Seed by seed 0.7, 0.4, 0.7: mean 0.6, s = sqrt(0.03).
    half = 4.30265273 * math.sqrt(0.03 / 3)
    assert rows[1].kl_difference == (pytest.approx(0.6), pytest.approx(half))
    # One seed has no interval, and other seeds no pairs.
    assert rows[2].kl == (pytest.approx(0.2), None)
    assert rows[2].kl_difference == (pytest.approx(-0.2), None)


def test_one_window_has_no_interval(
    work: Path, llama: Path, text_file: Path, resq: Callable[..., Result]
) -> None:
    options = ("--text", text_file, "--seqlen", 16, "--max-windows", 1)
    result = resq("compare", work / "s0", "--reference", llama, *options, "--json", "-")
    assert result.code == 0, result.err
    found = json.loads(result.out[result.out.index("{\n") :])
    assert found["windows"] == 1 and "seeds" not in found
    assert [found["folders"][0][key] for key in FIGURES if key.endswith("_interval")] == [None] * 4
    assert re.search(r"\d \+- -", result.out) and "- : one window has no interval" in result.out


def test_seeds_are_grouped(figures: dict[str, Any], work: Path) -> None:
    rtn, seeds = figures["seeds"]
    assert rtn["models"] == [str(work / "rtn")] and rtn["seeds"] == [0]
    assert seeds["models"] == [str(work / name) for name in ("s0", "s1", "s2")]
    assert seeds["seeds"] == [0, 1, 2]
    values = [found["kl_to_reference"] for found in figures["folders"][1:]]
    assert seeds["kl_to_reference"] == pytest.approx(statistics.fmean(values))
    half = 4.30265273 * statistics.stdev(values) / math.sqrt(3)
    assert seeds["kl_interval"] == pytest.approx(half, rel=1e-7)
    assert rtn["kl_interval"] is None and seeds["kl_difference_interval"] is None
    # Errors 0.1, 0.2 and 0.3 in the first layer, twice that in the second.
    assert seeds["layer_error"] == pytest.approx(0.3) and rtn["layer_error"] is None


def test_folders_that_differ_in_more_than_the_seed_are_apart() -> None:
    options = ResQConfig(seed=1)
    report = report_of(options, 0.1)
    variants = [
        folder("a", ResQConfig()),
        folder("b", ResQConfig(seed=3)),
        folder("other bits", ResQConfig(seed=1, kv_bits=16)),
        folder("a report", options, report=report),
        folder("other samples", options, report=report | {"config": {"samples": 3}}),
        folder("other source", options, report=report | {"inputs": {"files": {"a": "sha256:1"}}}),
        folder("16-bit"),
        folder("another 16-bit"),
    ]
    assert comparison.seed_groups(variants) == [[0, 1], *([place] for place in range(2, 8))]
    assert comparison.seed_groups(variants[1::-1]) == [[1, 0]]
    with pytest.raises(UsageError, match="--seeds: expected folders that differ in their seed al"):
        comparison.seed_groups(variants[1:])
    with pytest.raises(UsageError, match="got a and c with the same configuration and the seed 0"):
        comparison.seed_groups([variants[0], folder("c", ResQConfig())])


def test_json_has_the_documented_keys(figures: dict[str, Any]) -> None:
    assert set(figures) == KEYS
    assert set(figures["reference"]) == {*OF_A_MODEL, "perplexity"}
    assert all(set(found) == OF_A_FOLDER for found in figures["folders"])
    assert all(set(found) == {"models", "seeds", *FIGURES} for found in figures["seeds"])
    text = (Path(__file__).resolve().parents[2] / "docs/cli.md").read_text()
    section = text.split("## resq compare")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert not {*KEYS, *OF_A_FOLDER, "models"} - named
    _, distilled, *_ = figures["folders"]
    assert distilled["method"] == "resq, rtn, distilled" and distilled["dtype"] == "float32"
    assert distilled["bits"] == {
        "weights": [4, 8],
        "activations": [4, 8],
        "kv": [4, 8],
        "embedding": [8],
    }
    assert distilled["quantization"]["seed"] == 2 and distilled["bytes"] > 100_000
    assert distilled["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "error": pytest.approx(0.3),
    }
    rtn = figures["folders"][0]
    assert (rtn["method"], rtn["layers"]) == ("rtn, rtn", None)
    assert rtn["bits"]["weights"] == rtn["bits"]["kv"] == [4]
    assert figures["reference"]["method"] is figures["reference"]["bits"] is None


def test_page_has_the_figures_and_stands_alone(figures: dict[str, Any], work: Path) -> None:
    page = (work / "c.html").read_text()
    assert (page.count("<svg"), page.count("<table")) == (2, 2)
    without_names = re.sub(r'(xmlns[:a-z]*|rdf:resource)="[^"]*"', "", page)
    assert not re.search(r"(src|href)\s*=\s*['\"](?!#)|<script", without_names)
    for row in figures["seeds"]:
        assert f"<td>{row['perplexity']:.4f}</td>" in page
        half = "-" if row["kl_interval"] is None else f"{row['kl_interval']:.4f}"
        assert f"<td>{row['kl_to_reference']:.4f} ± {half}</td>" in page
    assert f"<td>{figures['reference']['perplexity']:.4f}</td>" in page
    assert "Without a quantization report: rtn." in page and ">down</text>" in page


def test_table_has_the_reference_first_and_the_labels(
    work: Path, llama: Path, text_file: Path, resq: Callable[..., Result], tmp_path: Path
) -> None:
    shutil.copytree(work / "s0", tmp_path / "rtn")  # the last parts of names are then the same
    options = ("--text", text_file, "--seqlen", 16, "--max-windows", 2)
    result = resq(
        "compare", work / "rtn", tmp_path / "rtn", llama, "--reference", work / "s1", *options
    )
    assert result.code == 0, result.err
    lines = [re.split(r" {2,}", line.strip()) for line in result.out.splitlines()]
    names = [str(work / "s1"), str(work / "rtn"), str(tmp_path / "rtn"), str(llama)]
    assert [line[0] for line in lines[2:6]] == names
    assert lines[3][1:3] == ["rtn, rtn", "4, 4, 4"] and lines[5][1:3] == ["-", "float32"]
    assert [line[-1] for line in lines[3:6]] == ["-", "0.1500", "-"]
    assert ["tokens", "32 (2 windows of 16)"] in lines


def test_batches_are_no_larger_than_the_reference() -> None:
    def batches(sizes: list[int | None], room: int | None) -> list[list[str]]:
        folders = [folder(str(place), bytes=size) for place, size in enumerate(sizes)]
        return [[each.name for each in batch] for batch in compare._batches(folders, room)]

    assert batches([4, 4, 3, 9, 20, 1], 10) == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert batches([5, 5, 10], 10) == [["0", "1"], ["2"]]
    assert batches([None, 1, 1], 10) == [["0"], ["1", "2"]]
    assert batches([1, 1], None) == [["0"], ["1"]]


def test_batches_change_nothing(
    figures: dict[str, Any],
    work: Path,
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "_batches", lambda folders, room: [[each] for each in folders])
    target = tmp_path / "c.json"
    options = ("--text", text_file, "--seqlen", 32, "--max-windows", 3, "--json", target)
    folders = [work / name for name in ("rtn", "s2")]
    assert resq("compare", *folders, "--reference", llama, *options).code == 0
    found = json.loads(target.read_text())
    for one, other in zip(found["folders"], figures["folders"][:2], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded."""

    def load_model(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", load_model)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("s0",), 2, "the following arguments are required: --reference"),
        (("--reference", "llama"), 2, "the following arguments are required: FOLDER"),
        (("s0", "./s0", "--reference", "llama"), 2, "every model once, got s0 and ./s0"),
        (("s0", "llama", "--reference", "llama"), 2, "every model once, got llama and llama"),
        (("s0", "missing/x/y", "--reference", "llama"), 1, "missing/x/y: there is no such folder"),
        (("s0", "empty", "--reference", "llama"), 1, "not a Hugging Face model folder"),
        (("s0", "bare", "--reference", "llama"), 1, "bare: holds no weights"),
        (("s0", "cut", "--reference", "llama"), 1, "cut/model.safetensors"),
        (("s0", "hash", "--reference", "llama"), 1, "hash: self_attn.key_rotation or"),
        (("s0", "report", "--reference", "llama"), 1, "layers: expected name and error of every"),
        (("s0", "words", "--reference", "llama"), 1, "of llama (320 words), got 384"),
        (("s0", "tokens", "--reference", "llama"), 1, "llama, got another token at position 0"),
        (("s0", "rtn", "--reference", "llama", "--seeds"), 2, "differ in their seed alone, got no"),
        (("s0", "--reference", "llama", "--seqlen", 65), 2, "--seqlen: expected at most 64"),
        (("s0", "--reference", "llama", "--json", "missing/c.json"), 2, "missing does not exist"),
        (("s0", "--reference", "llama", "--html", "missing/c.html"), 2, "--html: the folder"),
        (("s0", "--reference", "llama", "--html", "s0/config.json"), 2, "file than those of s0"),
        (("s0", "--reference", "llama", "--html", "c", "--json", "./c"), 2, "than that of --json"),
        (("s0", "--reference", "llama", "--text", "none"), 1, "text: none does not exist"),
        (("s0", "--reference", "llama", "--text", "short"), 1, "one window of 64 tokens, got 5"),
    ],
)
def test_it_is_refused_before_the_work(
    work: Path,
    llama: Path,
    text_file: Path,
    broken: Path,
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(broken)
    text = () if "--text" in arguments else ("--text", text_file)
    before = sorted(broken.rglob("*"))
    result = resq("compare", *arguments, *text)
    assert result.code == code
    assert sentence in result.sentence
    assert sorted(broken.rglob("*")) == before


@pytest.fixture(scope="session")
def broken(work: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to good models, damaged ones and texts."""
    broken = tmp_path_factory.mktemp("broken")
    (broken / "llama").symlink_to(llama)
    for name in ("s0", "rtn"):
        (broken / name).symlink_to(work / name)
    for name in ("bare", "cut", "hash", "report"):
        shutil.copytree(work / "s1", broken / name)
    (broken / "empty").mkdir()
    (broken / "bare/model.safetensors").unlink()
    weights = broken / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    config = read_json(broken / "hash/config.json")
    config["quantization_config"]["rotation_hash"] = "sha256:" + "0" * 64
    write_json(broken / "hash/config.json", config)
    write_json(broken / "report" / REPORT, {"layers": [{"name": "model.layers.0.q_proj"}]})
    save(tiny_llama(vocab_size=384), broken / "words")
    save(tiny_llama(), broken / "tokens")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    other = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(broken / "tokens")
    assert len(byte_tokenizer()("short", add_special_tokens=False)["input_ids"]) == 5
    (broken / "short").write_text("short")
    return broken
