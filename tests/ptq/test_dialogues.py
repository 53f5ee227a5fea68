"""Dialogues that a model writes: their form, their distribution, and what a run does with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_models import MODELS
from transformers import AutoModelForCausalLM

from resq_kernels.architecture import ModelShape
from resq_kernels.chat_template import Between, Template, read_template
from resq_kernels.config import ResQConfig
from resq_kernels.evaluate import measure
from resq_kernels.ptq import check
from resq_kernels.ptq import dialogues as module
from resq_kernels.ptq.dialogues import Dialogues, plan, write_dialogues
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.safetensors_io import read_json
from resq_kernels.testing.tiny_models import make_model, make_tokenizer, save_tiny_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] + '<|im_end|>.' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
# Ids above the tokenizer's 256 bytes and its end of text.
START, END = 257, 258
TWO_TURNS = Template((3, 1, 4), (Between((5, 6), (20, 21, 5)), Between((7,), (22,))))


def chat_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer = make_tokenizer()
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def written(folder: Path, work: Path, planned: Dialogues, seed: int = 0) -> torch.Tensor:
    """Windows of a model, those for the verdict last."""
    work.mkdir()
    some, held_out = write_dialogues(
        SourceModel(folder), planned, seed, Workspace(work), progress=False
    )
    assert some.shape == (planned.calibration, planned.seqlen)
    assert held_out.shape == (planned.held_out, planned.seqlen)
    assert some.dtype == held_out.dtype == torch.int64
    return torch.cat([some, held_out])


def follow(tokens: list[int], template: Template) -> list[bool]:
    """Which tokens of a dialogue the model chose, if the template's are where they must be."""
    begin = len(template.start)
    assert tuple(tokens[:begin]) == template.start
    chosen, waiting, ended = [False] * begin, [], 0
    for token in tokens[begin:]:
        chosen.append(not waiting)
        if waiting:
            assert token == waiting.pop(0)
            continue
        between = template.between[ended % len(template.between)]
        if token in between.ends:
            waiting, ended = list(between.following), ended + 1
    return chosen


@pytest.mark.parametrize("one_turn", [False, True])
def test_the_template_stands_between_the_messages(
    llama: Path, tmp_path: Path, one_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends that are likely, so that there are many messages; one of them is in what follows."""
    template = Template((3, 1, 4), (Between(tuple(range(40)), (20, 21, 5)),))
    if not one_turn:
        template = Template(
            (3, 1, 4), (*template.between, Between(tuple(range(100, 140)), (22, 101)))
        )
    monkeypatch.setattr(module, "TOKENS", 60)
    monkeypatch.setattr(module, "BATCH", 4)
    windows = written(llama, tmp_path / "work", Dialogues(template, 4, 1, 100))
    messages = 0
    for window in windows.tolist():
        first, second = window[:63], window[63:]
        for part in (first, second):
            chosen = follow(part, template)
            messages += sum(chosen[i] and not chosen[i + 1] for i in range(len(chosen) - 1))
    assert messages > 20
    assert len({tuple(window) for window in windows.tolist()}) == 5
    assert len({tuple(window[:63]) for window in windows.tolist()}) == 5


def test_tokens_are_drawn_as_the_model_says(llama: Path, tmp_path: Path) -> None:
    """Among the likeliest, with their probabilities.

    The sum of log p - E[log p] over its standard deviation is normal: below 4.5 but for one seed
    of 150,000. Under the probabilities of temperature 1.2 the same tokens are beyond it.
    """
    template = Template((3, 1, 4), (Between((319,), (20,)),))
    windows = written(llama, tmp_path / "work", Dialogues(template, 30, 0, 200))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    chosen = torch.tensor([follow(window, template) for window in windows.tolist()])[:, 1:]
    limit = logits.topk(module.TOP_K).values[..., -1:]
    drawn = windows[:, 1:, None]
    assert (logits.gather(-1, drawn) >= limit - 1e-4)[chosen].all()

    def distance(temperature: float) -> float:
        kept = logits.masked_fill(logits < limit, -math.inf)
        log_p = (kept / temperature).log_softmax(-1)
        p, finite = log_p.exp(), log_p.masked_fill(log_p == -math.inf, 0)
        mean = (p * finite).sum(-1)
        variance = (p * finite.square()).sum(-1) - mean.square()
        surprise = finite.gather(-1, drawn)[..., 0] - mean
        return float(surprise[chosen].sum() / variance[chosen].sum().sqrt())

    assert abs(distance(1.0)) < 4.5 < abs(distance(1.2))


def test_a_seed_is_a_draw(llama: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        written(llama, tmp_path / name, Dialogues(TWO_TURNS, 2, 0, 50), seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "resq"},
        {"method": "rtn"},
        {"method": "quarot", "weights": "rtn"},
        {"method": "quik", "weights": "rtn"},
    ],
)
def test_a_quarter_of_the_windows_is_the_default(chosen: dict[str, str]) -> None:
    shape = ModelShape.from_config(make_model().config.to_dict())
    for samples, count in ((3, 0), (4, 1), (11, 2)):
        config = ResQConfig(samples=samples, seqlen=64, **chosen)
        tokenizer = chat_tokenizer()
        planned, dialogues = plan(config, tokenizer, shape, torch.float32, "cpu", 3)
        assert planned.dialogues == count
        expected = Dialogues(read_template(tokenizer), count, 3, 64)
        assert dialogues == (expected if count else None)
    for without in (None, "", "{{ raise_exception('no') }}"):
        config = ResQConfig(seqlen=64, **chosen)
        planned, dialogues = plan(config, chat_tokenizer(without), shape, torch.float32, "cpu")
        assert planned.dialogues == 0 and dialogues is None


def test_where_none_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is asked for is refused; where nothing is asked for, what is lacking is said,
    but for a model that is not for chats."""
    shape, tokenizer = ModelShape.from_config(make_model().config.to_dict()), chat_tokenizer()

    def planned(tokenizer: Any = tokenizer, **options: Any) -> Dialogues | None:
        config, dialogues = plan(ResQConfig(**options), tokenizer, shape, torch.bfloat16, "cpu")
        assert config.dialogues == (0 if dialogues is None else dialogues.calibration)
        return dialogues

    assert planned(dialogues=3, seqlen=64).calibration == 3
    assert planned(dialogues=0) is None
    assert planned(method="rtn", weights="rtn") is None
    assert planned(method="rtn", weights="rtn", dialogues=1).calibration == 1
    start = len(read_template(tokenizer).start)
    assert planned(seqlen=2 * start) is not None
    words = f"the chat template begins with {start} tokens, windows have {2 * start - 1}$"
    with pytest.warns(UserWarning, match=f"^dialogues: none are written: {words}"):
        assert planned(seqlen=2 * start - 1) is None
    with pytest.raises(ValueError, match=f"^dialogues: expected 0, got 2: {words}"):
        planned(seqlen=2 * start - 1, dialogues=2)
    with pytest.raises(
        ValueError, match="^dialogues: expected 0, got 2: the tokenizer has no chat"
    ):
        planned(chat_tokenizer(None), dialogues=2)
    monkeypatch.setattr(module, "device_memory", lambda device: 10**6)
    monkeypatch.setattr(module, "product_dtype", lambda dtype, device: dtype)
    words = r"the whole model takes 0.0 GB, more than 75% of the memory of cpu, 0.0 GB$"
    with pytest.warns(UserWarning, match=words):
        assert planned() is None
    with pytest.raises(ValueError, match=words):
        planned(dialogues=2)


def test_the_memory_that_is_asked_for() -> None:
    """Llama-3-8B in bfloat16 or float32: weights, 48 x 544 tokens of cache, logits in float32."""
    shape = ModelShape("llama", 4096, 14336, 128256, 32, 32, 8, 128, 1e-5, (), False)
    template = Template((0,) * 32, TWO_TURNS.between)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "device_memory", lambda device: 0)
            patch.setattr(module, "product_dtype", lambda dtype, device: dtype)
            with pytest.raises(ValueError, match="GB, more than 75% of ") as caught:
                module._check(template, 2048, shape, dtype, "cpu")
        sizes.append(float(str(caught.value).split()[4]))
    weights, cache, logits = 8.030e9, 48 * 544 * 32 * 2 * 8 * 128, 48 * 128256
    expected = [(n * (weights + cache) + 8 * logits) / 1e9 for n in (4, 2)]
    assert sizes == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_run_calibrates_on_them_and_judges_by_others(
    tmp_path: Path, tokens: torch.Tensor, name: str
) -> None:
    """The same weights as if they had been given, and the verdict that transformers finds."""
    source = save_tiny_model(tmp_path / "in", **MODELS[name])
    planned = Dialogues(TWO_TURNS, 3, 8, 48)
    windows = written(source, tmp_path / "work", planned)
    out, config = tmp_path / "out", ResQConfig(kv_bits=16)
    report = quantize_folder(
        source, out, tokens, config, held_out=tokens, dialogues=planned, progress=False
    )
    given = torch.cat([windows[:3], tokens])
    quantize_folder(source, tmp_path / "given", given, config, progress=False)
    weights = [path / "model.safetensors" for path in (out, tmp_path / "given")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (report["windows"], report["dialogues"]) == (7, 3)
    assert report["verdict"]["windows"] == 4
    models = {
        key: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for key, folder in (("reference", source), ("model", out))
    }
    found, expected = report["verdict_in_dialogues"], measure(models, windows[3:])["model"]
    assert found["windows"] == 8 and found["seqlen"] == 48
    assert found["kl_to_reference"] == pytest.approx(expected.kl, rel=0.05)  # see test_verdict.py
    page = (out / "quantization_report.html").read_text()
    assert "7 windows of 48 tokens, of which the 16-bit model wrote 3: dialogues" in page
    for text in (page, (out / "README.md").read_text()):
        assert "KL in dialogues" in text
    assert read_json(out / "quantization_report.json") == report


def test_a_killed_run_does_not_write_them_again(
    qwen2: Path, tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    planned, written_now = Dialogues(TWO_TURNS, 5, 1, 48), []
    original = module._write

    def write(*arguments: Any) -> torch.Tensor:
        written_now.append(arguments)
        if len(written_now) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    def run(name: str, dialogues: Dialogues = planned) -> bytes:
        out = tmp_path / name
        quantize_folder(qwen2, out, tokens, dialogues=dialogues, resume=True, progress=False)
        return (out / "model.safetensors").read_bytes()

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
        words = r"the dialogues \(chat template or their number\) differ"
        for other in (
            Dialogues(TWO_TURNS, 4, 1, 48),
            Dialogues(Template((3, 1, 5), TWO_TURNS.between), 5, 1, 48),
        ):
            with pytest.raises(FileExistsError, match=words):
                run("killed", other)
        assert run("killed") == whole
    assert len(written_now) == 4  # three batches, one of them tried twice


def test_the_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("missing", "none", "limit", "larger")]
    for path, text in zip(files[1:], ("max\n", "4096\n", f"{2**62}\n"), strict=True):
        path.write_text(text)
    monkeypatch.setattr(check, "CONTAINER_LIMITS", files[:2])
    memory = check.device_memory("cpu")
    assert 2**28 < memory < 2**45
    monkeypatch.setattr(check, "CONTAINER_LIMITS", [*files[:2], files[3]])
    assert check.device_memory("cpu") == memory
    monkeypatch.setattr(check, "CONTAINER_LIMITS", files)
    assert check.device_memory("cpu") == 4096
