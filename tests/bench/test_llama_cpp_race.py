"""benchmarks/llama_cpp_race.py: who is tried, who wins, what the files hold; llama.cpp itself where
it is installed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from resq_kernels.bench import models
from resq_kernels.testing.quantized_models import random_quantized

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
TINY = ("llama", 64, 256, 2, 4, 2, 320, False)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """The race, its engines and its files."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(models.SIZES, "tiny", TINY)
    names = ("llama_cpp_race", "llama_cpp_engines", "llama_cpp_files")
    yield tuple(importlib.import_module(name) for name in names)  # type: ignore[misc]
    for name in names:
        sys.modules.pop(name)


class Engine:
    """An engine whose times are known: seconds of a call for each cache, or for any."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.prepared, self.runs = times, [], 0

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name == "prepare":
            work, tokens, cache = arguments
            assert tokens.shape == (work.batch, work.positions)
            self.prepared.append(str(cache))
        if name == "run":
            self.runs += 1
            return self.times.get(self.prepared[-1], 1.0)
        return None

    def close(self) -> None:
        """As a process would be."""


def test_the_fastest_type_and_cache_of_all_is_named(scripts: Any) -> None:
    race, _, _ = scripts
    running = {
        "ours": Engine({"None": 0.5}),
        "Q4_0": Engine({"KV f16": 2.0, "KV f16, flash": 1.6}),
        "Q4_1": Engine({"KV f16": 0.8, "KV q4_0, flash": 0.4}),
    }
    fastest: dict[str, str] = {}
    row = race._race(running, "tg@0", fastest, 3)
    assert row["which"] == "Q4_1, KV f16"
    assert (row["ours"], row["best_llama_cpp"], row["ratio"]) == (64.0, 40.0, 1.6)
    assert row["rounds"] == {"ours": [64.0] * 3, "Q4_0": [20.0] * 3, "Q4_1": [40.0] * 3}
    assert "KV q4_0, flash" not in running["Q4_1"].prepared  # where the cache is short

    tried = len(running["Q4_0"].prepared)
    row = race._race(running, "tg@1k", fastest, 3)
    assert row["which"] == "Q4_1, KV q4_0, flash" and row["best_llama_cpp"] == 80.0
    assert len(running["Q4_0"].prepared) == tried  # it lost the short test
    row = race._race(running, "pp4096", {"pp512": "Q4_0"}, 1)
    assert row["which"] == "Q4_0, KV q8_0, flash" and row["best_llama_cpp"] == 4096.0
    row = race._race(running, "tg@8k", {}, 1)  # no short test: all types
    assert row["which"] == "Q4_1, KV q4_0, flash" and len(row["tried"]) == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "MODEL: expected a folder or NAME[:LAYERS], got nowhere"),
        (["llama-3.2-1b:0"], "MODEL: expected a folder or NAME[:LAYERS], got llama-3.2-1b:0"),
        (["qwen2.5-7b"], "MODEL: expected a Llama"),
        (["llama-3.2-1b", "--text", "t"], "--text: no option beside llama-3.2-1b"),
        (["."], "--gguf: needed beside a folder"),
        (["llama-3.2-1b", "--tests", "pp64"], "invalid choice: 'pp64'"),
        (["llama-3.2-1b", "--rounds", "0"], "--rounds: "),
    ],
)
def test_usage_errors(
    scripts: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        scripts[0].main(arguments)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_our_engine_ends_where_it_began(scripts: Any, tmp_path: Path) -> None:
    _, engines, _ = scripts
    torch.manual_seed(0)
    model = random_quantized("llama")
    model.save_pretrained(tmp_path / "model")
    engine = engines.Ours(str(tmp_path / "model"), 4, torch.get_num_threads())
    try:
        tokens = np.random.default_rng(0).integers(0, 256, (2, 70))
        for test in (engines.Test(prompt=70, batch=2), engines.Test(context=38, batch=2)):
            engine.prepare(test, tokens)
            seconds = engine.run(), engine.run()
            assert min(seconds) > 0 and engine._kept.get_seq_length() == test.context
            assert test.tokens == (70 if test.prompt else 2 * 32)
            engine.finish()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        expected = loaded(torch.from_numpy(tokens[:1])).logits[0]
        assert np.array_equal(engine.logits(tokens[0]), expected.detach().numpy())
        load = engine.load()
        assert load["seconds"] > 0 and load["bytes"] > load["added"] >= 0
    finally:
        torch.set_grad_enabled(True)


def test_a_file_of_random_weights_has_the_shape(scripts: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = scripts[2].random_weights("tiny", 1, tmp_path)
    tensors = {t.name: tuple(t.shape) for t in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 12 and tensors["blk.0.ffn_down.weight"] == (256, 64)
    assert tensors["blk.0.attn_k.weight"] == (64, 32) and tensors["output.weight"] == (64, 320)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="expected a Llama, got qwen2.5-0.5b"):
        scripts[2].random_weights("qwen2.5-0.5b", 1, tmp_path)


def test_a_race_with_llama_cpp(scripts: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    race, _, _ = scripts
    out = tmp_path / "race"
    arguments = ["llama-3.2-1b:1", "--tests", "tg@0", "--rounds", "1", "--threads", "1"]
    race.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(out)])
    (row,) = json.loads((tmp_path / "race.json").read_text())["rows"]
    assert row["model"] == "llama-3.2-1b:1" and row["ratio"] > 0
    assert row["which"] in row["tried"] and "tg@0" in (tmp_path / "race.md").read_text()
