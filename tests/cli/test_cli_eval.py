"""Perplexity and divergence against float64, and what `resq eval` writes and refuses."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import POSITIONS, Result, byte_tokenizer, save, tiny_llama
from torch.nn import functional

from resq_kernels.evaluate import cut_windows, perplexity

KEYS = {
    "model",
    "adapter",
    "lo_bits",
    "text",
    "fake_quant",
    "perplexity",
    "tokens",
    "seqlen",
    "windows",
    "kl_to_reference",
    "top1_agreement",
    "seconds",
    "tokens_per_second",
}


def log_probabilities(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """log p of the targets' distributions in float64, [seqlen - 1, vocabulary]."""
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1]
    return functional.log_softmax(logits.double(), dim=-1)


def test_perplexity_is_the_papers_formula() -> None:
    model, tokens = tiny_llama(), torch.randint(1, 257, (700,))
    for seqlen in (2, 7, 64):
        count = 700 // seqlen
        means = []
        for window in tokens[: count * seqlen].view(count, seqlen):
            log_p = log_probabilities(model, window)
            means.append(-log_p[torch.arange(seqlen - 1), window[1:]].mean().item())
        expected = math.exp(sum(means) / count)
        found = perplexity(model, tokens, seqlen=seqlen)
        # float32 log_softmax over 257 words: |error| of a log p < 1e-5.
        assert found.perplexity == pytest.approx(expected, rel=2e-5)
        assert (found.windows, found.tokens, found.seqlen) == (count, count * seqlen, seqlen)
        assert (found.kl_to_reference, found.top1_agreement) == (None, None)
        # A protocol that keeps the tail, or that also predicts the first token, is told apart.
        shifted = perplexity(model, tokens[1:], seqlen=seqlen).perplexity
        assert shifted != pytest.approx(expected, rel=2e-5)


def test_rows_beyond_one_chunk_are_counted_once() -> None:
    model, tokens = tiny_llama(max_position_embeddings=600), torch.randint(1, 257, (600,))
    log_p = log_probabilities(model, tokens)
    expected = math.exp(-log_p[torch.arange(599), tokens[1:]].mean().item())
    assert perplexity(model, tokens, seqlen=600).perplexity == pytest.approx(expected, rel=2e-5)


def test_divergence_is_from_the_reference_to_the_model() -> None:
    model, reference = tiny_llama(0), tiny_llama(1)
    tokens = torch.randint(1, 257, (96,))
    forward = backward = 0.0
    for window in tokens.view(3, 32):
        p, q = log_probabilities(reference, window), log_probabilities(model, window)
        forward += (p.exp() * (p - q)).sum(-1).mean().item() / 3
        backward += (q.exp() * (q - p)).sum(-1).mean().item() / 3
    found = perplexity(model, tokens, seqlen=32, reference=reference).kl_to_reference
    assert found == pytest.approx(forward, rel=1e-4)
    assert found != pytest.approx(backward, rel=1e-4)
    assert perplexity(model, tokens, seqlen=32, reference=model).kl_to_reference == 0.0


def test_agreement_is_counted_over_all_targets() -> None:
    """Also beyond one chunk of logits, and not of the token after the last window."""
    model, reference = tiny_llama(max_position_embeddings=300), tiny_llama(1)
    with torch.no_grad():
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            b.copy_(a + 0.05 * b)
    tokens = torch.randint(1, 257, (600,))
    same = 0
    for window in tokens.view(2, 300):
        p, q = log_probabilities(reference, window), log_probabilities(model, window)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert 0 < same < 598
    found = perplexity(model, tokens, seqlen=300, reference=reference)
    assert found.top1_agreement == same / 598
    assert perplexity(model, tokens, seqlen=300, reference=model).top1_agreement == 1.0


def test_windows_touch_and_drop_the_tail() -> None:
    windows = cut_windows(torch.arange(23), 5)
    assert windows.tolist() == torch.arange(20).view(4, 5).tolist()
    assert cut_windows(torch.arange(23), 5, max_windows=2).shape == (2, 5)
    with pytest.raises(ValueError, match="seqlen: expected at least 2.*got 1"):
        cut_windows(torch.arange(23), 1)
    with pytest.raises(ValueError, match="at least one window of 24 tokens, got 23 tokens"):
        cut_windows(torch.arange(23), 24)
    with pytest.raises(ValueError, match="max_windows: expected at least 1, got 0"):
        cut_windows(torch.arange(23), 5, max_windows=0)


def test_model_that_returns_nan_is_refused_with_its_window() -> None:
    model, tokens = tiny_llama(), torch.randint(1, 200, (64,))
    tokens[40] = 250
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = torch.nan
    with pytest.raises(ValueError, match="logits of window 1 are not finite"):
        perplexity(model, tokens, seqlen=32)


def test_foreign_vocabulary_is_refused() -> None:
    tokens = torch.full((64,), 320)
    with pytest.raises(ValueError, match="token 320 is outside the model's vocabulary of 320"):
        perplexity(tiny_llama(), tokens, seqlen=32)
    with pytest.raises(ValueError, match="vocabulary of 320 words as model has, got 300"):
        perplexity(tiny_llama(), tokens - 1, seqlen=32, reference=tiny_llama(vocab_size=300))


def test_training_mode_is_restored() -> None:
    model = tiny_llama().train()
    perplexity(model, torch.randint(1, 257, (64,)), seqlen=32)
    assert model.training


def test_eval_writes_the_documented_keys(
    llama: Path, text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    target = tmp_path / "eval.json"
    result = resq("eval", llama, "--text", text_file, "--reference", llama, "--json", target)
    assert (result.code, result.err) == (0, "")
    figures = json.loads(target.read_text())
    assert set(figures) == KEYS
    data = text_file.read_bytes()
    windows = len(data) // POSITIONS  # one token a byte, no BOS
    assert (figures["seqlen"], figures["windows"]) == (POSITIONS, windows)
    assert figures["tokens"] == windows * POSITIONS
    assert (figures["kl_to_reference"], figures["top1_agreement"]) == (0.0, 1.0)
    assert "100.00%" in result.out
    ids = byte_tokenizer()(text_file.read_text(encoding="utf-8"), add_special_tokens=False)
    tokens = torch.tensor(ids["input_ids"])
    assert tokens.numel() == len(data)
    direct = perplexity(tiny_llama(), tokens, seqlen=POSITIONS)
    assert figures["perplexity"] == pytest.approx(direct.perplexity, rel=1e-6)
    assert f"{direct.perplexity:.4f}" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_eval_reads_wikitext_from_the_folder_that_the_variable_names(
    llama: Path, tmp_path: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = A title = \n \n Some words . \n" * 5)
    monkeypatch.setenv("RESQ_WIKITEXT2", str(tmp_path))
    result = resq("eval", llama, "--dataset", "wikitext2", "--seqlen", 32, "--max-windows", 2)
    assert result.code == 0
    assert "64 (2 windows of 32)" in result.out


def test_eval_of_a_folder_that_lacks_a_tensor_is_refused(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tiny_llama(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = resq("eval", folder, "--text", text_file)
    assert result.code == 1
    assert result.sentence.endswith("the checkpoint lacks model.layers.1.mlp.up_proj.weight")


def test_eval_of_a_truncated_checkpoint_is_refused(
    text_file: Path, tmp_path: Path, resq: Callable[..., Result]
) -> None:
    folder = save(tiny_llama(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = resq("eval", folder, "--text", text_file)
    assert result.code == 1
    assert str(folder) in result.sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"good text \xff and more", "expected UTF-8, got byte 0xff at position 10"),
        (b"short", f"at least one window of {POSITIONS} tokens, got 5 tokens"),
    ],
)
def test_eval_refuses_a_text_that_it_cannot_use(
    llama: Path, tmp_path: Path, resq: Callable[..., Result], content: bytes, sentence: str
) -> None:
    path, target = tmp_path / "text.txt", tmp_path / "eval.json"
    path.write_bytes(content)
    result = resq("eval", llama, "--text", path, "--json", target)
    assert result.code == 1
    assert sentence in result.sentence
    assert not target.exists()


def test_eval_refuses_windows_beyond_the_model(
    llama: Path, text_file: Path, resq: Callable[..., Result]
) -> None:
    result = resq("eval", llama, "--text", text_file, "--seqlen", POSITIONS + 1)
    assert result.code == 2
    assert f"--seqlen: expected at most {POSITIONS}" in result.sentence
    result = resq("eval", llama, "--text", text_file, "--seqlen", 1)
    assert result.code == 2
    assert "expected a whole number of at least 2, got '1'" in result.sentence


def test_eval_without_wikitext_says_how_to_get_it(
    llama: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RESQ_WIKITEXT2", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = resq("eval", llama)
    assert result.code == 1
    assert "RESQ_WIKITEXT2" in result.sentence and "resq_kernels[datasets]" in result.sentence


def test_eval_tasks_returns_the_harness_numbers(
    llama: Path, tmp_path: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.1, "samples": 4}
    asked = {}

    def simple_evaluate(**options: object) -> dict[str, object]:
        asked.update(options)
        return {"results": {"arc_easy": scores}}

    class HFLM:
        def __init__(self, pretrained: object, tokenizer: object, batch_size: int) -> None:
            self.words = (pretrained.config.vocab_size, len(tokenizer), batch_size)

    class TaskManager:
        all_tasks = ("arc_easy", "piqa")

        def __init__(self, include_path: str | None) -> None:
            self.include_path = include_path

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    harness, models, huggingface, tasks = (types.ModuleType(name) for name in names)
    harness.models, models.huggingface, harness.tasks = models, huggingface, tasks
    huggingface.HFLM, harness.simple_evaluate = HFLM, simple_evaluate
    tasks.TaskManager = TaskManager
    for name, module in zip(names, (harness, models, huggingface, tasks), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    target = tmp_path / "tasks.json"
    result = resq("eval", llama, "--tasks", "arc_easy,piqa", "--json", target)
    assert result.code == 0, result.err
    assert asked["tasks"] == ["arc_easy", "piqa"]
    assert asked["model"].words == (320, 257, 1)
    assert (asked["num_fewshot"], asked["limit"]) == (None, None)
    figures = json.loads(target.read_text())
    unset = {"num_fewshot": None, "limit": None, "batch_size": None, "include_path": None}
    assert figures["task_options"] == unset and "limit" not in result.out
    assert figures["tasks"] == {"arc_easy": {"acc": 0.25, "samples": 4.0}}
    assert "perplexity" not in figures
    assert "acc 0.2500" in result.out
    result = resq("eval", llama, "--tasks", "arc_easy", "--reference", llama)
    assert result.code == 2
    assert result.sentence.startswith("--reference: needs a text")
    result = resq("eval", llama, "--tasks", "arc_easy,nothing")
    wanted = "--tasks: expected a task that lm-eval knows, got 'nothing'"
    assert (result.code, result.sentence) == (2, wanted)
    options = ("--num-fewshot", 0, "--limit", 2, "--batch-size", 3, "--include-path", tmp_path)
    result = resq("eval", llama, "--tasks", "piqa", *options, "--json", target)
    assert result.code == 0, result.err
    assert (asked["num_fewshot"], asked["limit"], asked["model"].words[2]) == (0, 2, 3)
    assert asked["task_manager"].include_path == str(tmp_path)
    given = {"num_fewshot": 0, "limit": 2, "batch_size": 3, "include_path": str(tmp_path)}
    assert json.loads(target.read_text())["task_options"] == given
    assert "the first 2 questions of each task" in result.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--limit", 1), "--limit: needs --tasks"),
        (("--num-fewshot", 0), "--num-fewshot: needs --tasks"),
        (("--batch-size", 2), "--batch-size: needs --tasks"),
        (("--include-path", "."), "--include-path: needs --tasks"),
        (("--tasks", "a", "--include-path", ""), "--include-path: expected a folder, got ''"),
        (("--tasks", "a", "--limit", 0), "argument --limit: expected a whole number of at least 1"),
    ],
)
def test_options_of_tasks_are_checked(
    resq: Callable[..., Result], options: tuple[object, ...], sentence: str
) -> None:
    result = resq("eval", "model", *options)
    assert result.code == 2 and result.sentence.startswith(sentence)


TASK = """\
task: {name}
custom_dataset: !function rows.rows
test_split: test
fewshot_split: train
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
fewshot_delimiter: "."
metric_list:
  - metric: acc
"""
ROWS = """\
def rows(**options):
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in ROWS.items()}

ROWS = """


def best_choice(model: Any, prompt: str, choices: list[str]) -> int:
    """The choice with the largest log likelihood after the prompt, one forward pass each."""
    scores = []
    for choice in choices:
        ids = byte_tokenizer()(prompt + choice, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].double().log_softmax(-1)
        chosen = logs.gather(1, ids[0, 1:, None])[:, 0]
        scores.append(float(chosen[-len(choice) :].sum()))
    return max(range(len(choices)), key=scores.__getitem__)


def test_options_of_tasks_do_what_lm_eval_says(
    llama: Path, tmp_path: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of our own, offline, against log likelihoods of single forward passes."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="the extra `tasks` is not installed")
    # Without lm-eval's own thousands of tasks, whose files take seconds to list.
    own = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", own)
    choices = list("abcdefgh")
    words = ["red", "big", "old", "new", "far", "hot", "dim", "dull", "icy", "blue", "rich", "dark"]
    questions = [f"is it {word}" for word in words]
    model, example = tiny_llama().eval(), "is it so a."
    alone = [best_choice(model, question, choices) for question in questions]
    shown = [best_choice(model, example + question, choices) for question in questions]
    # Labels by which every setting has an accuracy of its own.
    labels = [*alone[:6], *((best + 1) % 8 for best in alone[6:])]
    rows = [
        {"question": question, "choices": choices, "label": label}
        for question, label in zip(questions, labels, strict=True)
    ]
    first = {"question": "is it so ", "choices": choices, "label": 0}
    (tmp_path / "own.yaml").write_text(TASK.format(name="own"))
    (tmp_path / "rows.py").write_text(ROWS + repr({"test": rows, "train": [first]}))

    def accuracy(*options: object) -> float:
        target = tmp_path / "figures.json"
        folder = ("--include-path", tmp_path, "--device", "cpu", "--json", target)
        result = resq("eval", llama, "--tasks", "own", *folder, *options)
        assert result.code == 0, result.err
        return json.loads(target.read_text())["tasks"]["own"]["acc"]

    def expected(best: list[int], count: int) -> float:
        pairs = list(zip(best, labels, strict=True))[:count]
        return sum(a == b for a, b in pairs) / count

    assert len({expected(alone, 12), expected(alone, 4), expected(shown, 12)}) == 3
    assert accuracy() == accuracy("--batch-size", 4) == pytest.approx(expected(alone, 12))
    assert accuracy("--limit", 4) == pytest.approx(expected(alone, 4))
    assert accuracy("--num-fewshot", 1) == pytest.approx(expected(shown, 12))


def test_eval_tasks_without_lm_eval_say_what_to_install(
    llama: Path, resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = resq("eval", llama, "--tasks", "arc_easy")
    assert result.code == 1
    assert "pip install 'resq_kernels[tasks]'" in result.sentence
    assert resq("eval", llama, "--tasks", " , ").code == 2
