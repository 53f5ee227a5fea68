"""How quantized weights get from a folder into the kernels: the same bits on every way, or an
error. tests/ptq/test_checkpoint.py has the errors of damaged folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from resq_kernels import architecture
from resq_kernels.checkpoint import keep_rows, open_folder
from resq_kernels.formats import PackedWeight
from resq_kernels.nn import convert
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.safetensors_io import CheckpointError, CheckpointReader
from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "model"
    random_quantized("qwen2", num_hidden_layers=3).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def packed_weights(model: Any) -> dict[str, PackedWeight]:
    named = model.named_modules()
    return {name: module.packed() for name, module in named if isinstance(module, ResQLinear)}


def assert_same(left: Any, right: Any) -> None:
    a, b = packed_weights(left), packed_weights(right)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert all(torch.equal(x, y) for x, y in zip(a[name][:3], b[name][:3], strict=True)), name
        assert a[name][3:] == b[name][3:]
    with torch.no_grad():
        assert torch.equal(left(IDS).logits, right(IDS).logits)


def test_threads_do_not_change_bits(folder: Path, threads: int) -> None:
    several = AutoModelForCausalLM.from_pretrained(folder)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [threads, threads]
    torch.set_num_threads(1)
    assert_same(several, AutoModelForCausalLM.from_pretrained(folder))
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    state = several.state_dict()
    assert state.keys() == stored.keys() - {architecture.GUARD}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


def test_weights_that_transformers_loads_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device map transformers loads them, tensor by tensor; else they are read here."""
    read: list[str] = []
    whole = convert._read_weight

    def count(linear: ResQLinear, name: str, reader: Any) -> None:
        read.extend([name] if reader is not None and linear.weight_lo is None else [])
        whole(linear, name, reader)

    monkeypatch.setattr(convert, "_read_weight", count)
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert read == []
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert len(set(read)) == len(read) == 3 * 7 + 2  # linears, the embedding, the head
    assert_same(ours, theirs)


def test_workers_compute_alone(threads: int) -> None:
    counts: list[int] = []
    convert._run([lambda: counts.append(torch.get_num_threads())] * 6, 2)
    assert counts == [1] * 6


def test_what_a_worker_raises_is_raised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    def refuse(linear: ResQLinear) -> None:
        raise RuntimeError("no memory for this one")

    monkeypatch.setattr(ResQLinear, "pack", refuse)
    with pytest.raises(RuntimeError, match="no memory for this one"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_tensors_are_still_reported(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    unknown = {"score.weight_lo": torch.zeros(3), "model.extra.weight_scale": torch.zeros(3)}
    save_file(load_file(path) | unknown, path, metadata={"format": "pt"})
    load = AutoModelForCausalLM.from_pretrained
    _, info = load(tmp_path, output_loading_info=True)
    assert set(info.pop("unexpected_keys")) == set(unknown) and not any(info.values())
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    head = {f"lm_head.weight_{part}" for part in ("lo", "hi", "scale")}
    assert set(info["unexpected_keys"]) == {*unknown, *head}


def test_a_tensor_is_read_as_it_is_stored(folder: Path) -> None:
    reader = CheckpointReader(folder)
    names = list(reader.tensors)
    assert any(reader.info(name).bytes == 0 for name in names)
    expected = dict(reader.load_each(names))
    with reader.reading() as read, ThreadPoolExecutor(4) as pool:
        for name, tensor in zip(names * 5, pool.map(read, names * 5), strict=True):
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_a_part_of_the_rows_is_read(folder: Path) -> None:
    whole = dict(open_folder(folder).reader.load_each(open_folder(folder).names))
    weights = {name for name in whole if ".weight_" in name}
    for index in range(4):
        opened = open_folder(folder)
        keep_rows(opened, index, 4)
        with opened.reader.reading() as read:
            for name, tensor in whole.items():
                expected = tensor.chunk(4)[index] if name in weights else tensor
                assert torch.equal(read(name), expected)


def test_a_file_that_shrinks_while_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    last = max(reader.tensors.values(), key=lambda info: info.start)
    with last.file.open("r+b") as stream:
        stream.truncate(last.file.stat().st_size - 1)
    with reader.reading() as read, pytest.raises(CheckpointError, match=f"{last.name}: truncated"):
        read(last.name)
