"""Tensor parallel: two and four processes compute the bits of one, each with its share."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import multiprocessing
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import start_processes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.quantizers.base import HfQuantizer

import resq_kernels
from resq_kernels import ResQConfig, safetensors_io
from resq_kernels.architecture import ModelShape
from resq_kernels.integrations import transformers_parallel
from resq_kernels.nn.decode_graph import DecodeGraph
from resq_kernels.nn.kv_cache import ResQCache, ResQCacheLayer
from resq_kernels.nn.tensor_parallel import check_degree, parallel_of
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs/integrations.md"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SECONDS = 300  # after which ranks that wait for one another are ended

# Four key/value heads, unless a model says otherwise.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
MODELS: dict[str, tuple[str, ResQConfig, dict[str, Any]]] = {
    "llama": ("llama", ResQConfig(), {}),
    "qwen2 tied": ("qwen2", ResQConfig(), {"tie_word_embeddings": True, "head_dim": 128}),
    "16 bits": ("llama", ResQConfig(kv_bits=16, embedding_bits=16), {}),
    "quarot": ("llama", ResQConfig(method="quarot"), {"tie_word_embeddings": True}),
    "quik": ("llama", ResQConfig(method="quik"), {"tie_word_embeddings": True}),
    "rtn": ("qwen2", ResQConfig(method="rtn"), {"tie_word_embeddings": True}),
    "llama biases": ("llama", ResQConfig(), {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", ResQConfig(), {}),
    "qwen3": ("qwen3", ResQConfig(), {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", ResQConfig(kv_bits=16), {"mlp_bias": True}),
    "one kv head": ("llama", ResQConfig(), {"num_key_value_heads": 1}),
}
PASSES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", F32, {}),
    ("llama", BF16, {"lo_bits": 8}),
    ("qwen2 tied", F32, {}),
    ("qwen2 tied", BF16, {}),
    ("16 bits", F16, {}),
    ("16 bits", F32, {}),
    ("quarot", BF16, {}),
    ("quik", BF16, {}),
    ("rtn", F32, {}),
    ("llama biases", BF16, {}),
    ("mistral", F32, {}),
    ("qwen3", BF16, {}),
    ("smollm3", F32, {}),
]
IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :7] = PADDED[2, :1] = 0
SAMPLING = {"pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    for name, (kind, options, sizes) in MODELS.items():
        random_quantized(kind, options, **{**HEADS, **sizes}).save_pretrained(root / name)
    (root / "out").mkdir()
    (root / "out/model-resq").symlink_to(root / "llama")
    make_tokenizer().save_pretrained(root / "llama")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 4])
def test_ranks(folder: Path, degree: int) -> None:
    """Everything that needs processes: starting them takes most of the time."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # A server that has imported everything once forks the ranks.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "transformers.models.qwen2", "torch.distributed"])
    started = start_processes(
        rank_main, (degree, port, folder), degree, join=False, start_method="forkserver"
    )
    end = time.monotonic() + SECONDS
    try:
        while not started.join(timeout=1):  # raises what a rank raises
            assert time.monotonic() < end, "the ranks wait for one another"
    finally:
        for process in started.processes:
            process.kill()


def rank_main(rank: int, degree: int, port: int, folder: Path) -> None:
    """What `torchrun` does for a script, then the checks."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{degree}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # pages without tokens then have the same bytes
    os.chdir(folder)
    check_snippet(rank)
    for name, dtype, options in PASSES:
        check_passes(folder / name, rank, degree, dtype, options)
    check_refusals(folder, degree)
    if degree == 2:
        check_other_ways(folder / "llama")
        check_static_cache(folder / "16 bits")
    torch.distributed.destroy_process_group()


def check_snippet(rank: int) -> None:
    """transformers makes the ranks, as it would in a script of a user."""
    [code] = [
        code
        for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
        if "DistributedConfig" in code
    ]
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("max_new_tokens=40", "max_new_tokens=5"), found)
    assert bool(printed.getvalue()) == (rank == 0)
    alone = AutoModelForCausalLM.from_pretrained("out/model-resq")
    assert torch.equal(found["tokens"], alone.generate(**found["prompt"], max_new_tokens=5))


@torch.no_grad()
def check_passes(
    folder: Path, rank: int, degree: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    alone = resq_kernels.from_pretrained(folder, dtype=dtype, **options)
    with counted_reads() as sizes:
        shared = resq_kernels.from_pretrained(folder, dtype=dtype, tp_plan="auto", **options)
    assert sum(sizes) == check_share(alone, shared, rank, degree)
    caches: list[Any] = []
    outputs: list[list[torch.Tensor]] = []
    for model in (alone, shared):
        paged = alone.hf_quantizer.stored.config.kv_bits == 4
        cache = ResQCache(model.config) if paged else DynamicCache(config=model.config)
        prompt = model(IDS, attention_mask=PADDED, cache=cache, output_hidden_states=True)
        steps, padded = [], PADDED
        for token in (7, 250):
            padded = torch.cat([padded, torch.ones(3, 1, dtype=torch.int64)], dim=1)
            new = torch.full((3, 1), token)
            steps.append(model(new, attention_mask=padded, cache=cache).logits)
        tokens = model.generate(
            IDS, attention_mask=PADDED, max_new_tokens=5, do_sample=False, **SAMPLING
        )
        outputs.append([prompt.logits, *prompt.hidden_states, *steps, tokens])
        caches.append(cache)
    for expected, found in zip(*outputs, strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)
    for expected, found in zip(*(cache.layers for cache in caches), strict=True):
        for a, b in zip(held(expected), held(found), strict=True):
            heads = a.chunk(degree, dim=1)[rank]
            assert heads.shape[1] * degree == HEADS["num_key_value_heads"]
            assert torch.equal(b, heads)


def held(layer: Any) -> list[torch.Tensor]:
    return [layer.paged.held()] if isinstance(layer, ResQCacheLayer) else [layer.keys, layer.values]


def check_share(alone: Any, shared: Any, rank: int, degree: int) -> int:
    """A rank has its rows of all that is quantized; returns their bytes."""
    size, whole, own = 0, alone.state_dict(), shared.state_dict()
    assert whole.keys() == own.keys()
    for name, tensor in own.items():
        expected = whole[name]
        if ".weight_" in name or name.endswith("_proj.bias"):
            expected = expected.chunk(degree)[rank]
            assert len(expected) * degree == len(whole[name])
            size += 0 if name.endswith("bias") else tensor.numel() * tensor.itemsize
        assert torch.equal(tensor, expected), name
    assert shared.num_parameters() == alone.num_parameters()
    assert parallel_of(alone) is None
    return size


@contextlib.contextmanager
def counted_reads() -> Any:
    """Sizes of all reads of weights."""
    sizes: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        sizes.append(preadv(*arguments))
        return sizes[-1]

    safetensors_io.os.preadv = counted
    try:
        yield sizes
    finally:
        safetensors_io.os.preadv = preadv


def check_refusals(folder: Path, degree: int) -> None:
    def refused(words: str, name: str = "llama", **config: Any) -> None:
        with pytest.raises(ValueError, match=words):
            given = DistributedConfig(**config)
            AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=given)

    heads = rf"a degree that divides num_key_value_heads \(1\), got {degree}"
    refused(heads, "one kv head", tp_size=degree)
    plan = {"model.layers.*.mlp.gate_proj": "colwise"}
    refused('tp_plan: expected "auto" .*, got .*colwise', tp_size=degree, tp_plan=plan)
    refused(r'tp_plan: expected "auto" .*, got \{\}', tp_size=degree, tp_plan={})
    refused(f"fsdp_size: expected 1 .*, got {degree}", fsdp_size=degree)
    refused(f"pp_size: expected 1 .*, got {degree}", pp_size=degree)
    option = {"enable_sequence_parallel": True}
    refused("enable_sequence_parallel: expected False", tp_size=degree, **option)


@torch.no_grad()
def check_other_ways(folder: Path) -> None:
    """Ways to load a model, to call it and to change it."""
    alone = AutoModelForCausalLM.from_pretrained(folder)
    shared = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    embeds = alone.get_input_embeddings()(IDS)
    assert torch.equal(shared.get_input_embeddings()(IDS), embeds)
    expected = alone(IDS).logits
    with_embeds = alone(inputs_embeds=embeds).logits
    assert torch.equal(shared(inputs_embeds=embeds).logits, with_embeds)
    assert torch.equal(copy.deepcopy(shared)(IDS).logits, expected)
    compiled = torch.compile(shared, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    searched = [
        model.generate(IDS, max_new_tokens=4, do_sample=False, num_beams=2, **SAMPLING)
        for model in (alone, shared)
    ]
    assert torch.equal(*searched)
    for ids, got in ((IDS + 1000, 1000 + int(IDS[0, 0])), (-1 - IDS, -1 - int(IDS[0, 0]))):
        with pytest.raises(RuntimeError, match=f"ids: expected 0 to 319, got {got}"):
            shared(ids)
    for layer in shared.model.layers:
        layer.self_attn.unfuse()
        layer.mlp.unfuse()
    assert torch.equal(shared(IDS).logits, expected)
    assert torch.equal(shared.to(BF16)(IDS).logits, copy.deepcopy(alone).to(BF16)(IDS).logits)
    with pytest.raises(ValueError, match="save_pretrained: expected all of a model, got a rank of"):
        shared.save_pretrained(folder / "again")
    cache = ResQCache(shared.config)
    shared(IDS, cache=cache)
    with pytest.raises(ValueError, match="DecodeGraph: model: expected all of a model"):
        DecodeGraph(shared, cache, 1)

    decoder = AutoModel.from_pretrained(folder, tp_plan="auto")
    states = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
    assert torch.equal(decoder(IDS).last_hidden_state, states)
    given = {"config": AutoConfig.from_pretrained(folder), "state_dict": alone.state_dict()}
    loaded = LlamaForCausalLM.from_pretrained(None, **given, tp_plan="auto")
    assert parallel_of(loaded).degree == 2 and torch.equal(loaded(IDS).logits, expected)


def check_static_cache(folder: Path) -> None:
    """transformers makes one for the heads of a rank."""
    tokens = [
        AutoModelForCausalLM.from_pretrained(folder, **plan).generate(
            IDS[:1], max_new_tokens=4, do_sample=False, cache_implementation="static", **SAMPLING
        )
        for plan in ({}, {"tp_plan": "auto"})
    ]
    assert torch.equal(*tokens)


def test_degrees_that_do_not_divide() -> None:
    config = random_quantized("llama", **HEADS).config.to_dict()
    shape, options = ModelShape.from_config(config), ResQConfig()
    check_degree(shape, options, 4)
    for name, change in {
        "num_key_value_heads": {"kv_heads": 2},
        "hidden_size": {"hidden": 130},
        "intermediate_size": {"intermediate": 190},
        "vocab_size": {"vocab": 321},
    }.items():
        other = dataclasses.replace(shape, **change)
        [size] = change.values()
        words = rf"tensor parallel: expected a degree that divides {name} \({size}\), got 4"
        with pytest.raises(ValueError, match=words):
            check_degree(other, options, 4)
    check_degree(other, ResQConfig(embedding_bits=16), 4)  # a vocabulary that stays whole


def test_without_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers then makes one rank of "auto"."""
    load = AutoModelForCausalLM.from_pretrained
    alone = load(folder / "llama", distributed_config=DistributedConfig(tp_plan="auto"))
    assert parallel_of(alone) is None
    monkeypatch.delattr(HfQuantizer, "update_parallel_plan")
    with pytest.raises(ValueError, match=r"distributed_config: expected None before transformers"):
        transformers_parallel.degree_of(alone.config)
