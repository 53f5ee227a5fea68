"""How quantized weights get from a folder into the kernels: the same bits on every way, or an
error. tests/ptq/test_checkpoint.py has the errors of damaged folders."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from resq_kernels import architecture, formats
from resq_kernels.checkpoint import keep_rows, open_folder
from resq_kernels.formats import PackedWeight, QuantizedWeight
from resq_kernels.nn import convert
from resq_kernels.nn.linear import ResQLinear
from resq_kernels.safetensors_io import CheckpointError, CheckpointReader
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.weight_reader import reading
from resq_kernels.weights import quantize_weight

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
    whole = convert._packed

    def count(linears: Any, names: list[str], reader: Any) -> PackedWeight | None:
        weight = whole(linears, names, reader)
        read.extend(names if weight is not None else [])
        return weight

    monkeypatch.setattr(convert, "_packed", count)
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
    def refuse(weight: QuantizedWeight) -> None:
        raise RuntimeError("no memory for this one")

    monkeypatch.setattr(PackedWeight, "pack", refuse)
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


def rows_of(linears: tuple[str, ...], stored: dict[str, torch.Tensor]) -> QuantizedWeight:
    parts = [QuantizedWeight.read(stored.__getitem__, linear) for linear in linears]
    return QuantizedWeight.cat(parts)


def read_by(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The linears that are read at once."""
    linears = {name.rpartition(".")[0] for name in names if name.endswith(".weight_lo")}
    apart = [(linear,) for linear in linears]
    layers = {linear.partition(".self_attn.")[0] for linear in linears if ".q_proj" in linear}
    qkv = [tuple(f"{layer}.{part}" for part in architecture.QKV) for layer in layers]
    return apart + qkv


def test_rows_are_read_as_they_are_stored(folder: Path) -> None:
    reader = CheckpointReader(folder)
    stored = dict(reader.load_each(reader.tensors))
    assert any(tensor.numel() == 0 for name, tensor in stored.items() if ".weight_lo" in name)
    rng = random.Random(torch.initial_seed())
    cases = []
    for linears in read_by(stored):
        n = rows_of(linears, stored).n
        cuts = [sorted(rng.sample(range(n + 1), 2)) for _ in range(4)]
        cases += [(linears, start, stop) for start, stop in [(0, n), (n - 1, n), *cuts]]
    with reading(reader) as read, ThreadPoolExecutor(4) as pool:

        def same(case: tuple[tuple[str, ...], int, int]) -> bool:
            linears, start, stop = case
            expected = [tensor[start:stop] for tensor in rows_of(linears, stored)]
            pairs = zip(read(*case), expected, strict=True)
            return all(got.dtype == want.dtype and torch.equal(got, want) for got, want in pairs)

        assert all(pool.map(same, cases * 3))


def test_a_part_of_the_rows_is_read(folder: Path) -> None:
    stored = dict(open_folder(folder).reader.load_each(open_folder(folder).names))
    for index in range(4):
        opened = open_folder(folder)
        keep_rows(opened, index, 4)
        own = {
            name: tensor.chunk(4)[index] for name, tensor in stored.items() if ".weight_" in name
        }
        with reading(opened.reader) as read:
            for linears in read_by(own):
                expected = rows_of(linears, own)
                pairs = zip(read(linears, 0, expected.n), expected, strict=True)
                assert all(torch.equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("n", [1, 64, 65, 128, 200])
def test_a_weight_packed_in_pieces_is_the_weight(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """And is nobody else's memory: the pieces are overwritten while it is read."""
    whole = quantize_weight(torch.randn(n, 40), 8)
    memory = QuantizedWeight(*(torch.empty_like(tensor) for tensor in whole))
    pieces: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> QuantizedWeight:
        pieces.append((start, stop))
        for kept, tensor in zip(memory, whole, strict=True):
            kept[: stop - start] = tensor[start:stop]
        return QuantizedWeight(*(kept[: stop - start] for kept in memory))

    monkeypatch.setattr(formats, "_READ_BYTES", 40 * 100)
    got, expected = PackedWeight.read(read, n, 40), PackedWeight.pack(whole)
    for tensor in memory:
        tensor.fill_(1)
    assert pieces == [(a, min(a + 64, n)) for a in range(0, n, 64)]
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
    assert got[3:] == expected[3:]


def test_a_file_that_shrinks_while_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    weights = [info for info in reader.tensors.values() if ".weight_" in info.name]
    last = max(weights, key=lambda info: info.start)
    with last.file.open("r+b") as stream:
        stream.truncate(last.start + last.bytes - 1)
    linear, rows = last.name.rpartition(".")[0], last.shape[0]
    with reading(reader) as read:
        with pytest.raises(CheckpointError, match=f"{last.name}: truncated"):
            read([linear], 0, rows)
        read([linear], 0, rows - 1)
