"""DecodeGraph on a CPU: the step that CUDA captures, its bits, its bookkeeping and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from resq_kernels import DecodeGraph, ResQCache, ResQConfig
from resq_kernels.testing.quantized_models import random_quantized

PAGE = 32
MODELS = {
    "llama, 4 heads of 64 over 2": ("llama", {}),
    "llama, 2 heads of 128 over 1": (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 256},
    ),
    "qwen2, 4 heads of 64 over 2": (
        "qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256},
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_quantized("llama")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(7))


def filled(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> ResQCache:
    """A cache after the prompt ids, left- or right-padded as mask says."""
    cache = ResQCache(model.config, PAGE)
    ordinary(model, cache, ids, mask)
    return cache


@torch.no_grad()
def ordinary(
    model: Any, cache: ResQCache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [B, vocabulary] after the tokens ids, by a call of the model."""
    options: dict[str, Any] = {}
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options = {"attention_mask": mask, "position_ids": positions}
    return model(ids, past_key_values=cache, use_cache=True, **options).logits[:, -1]


def same_pages(one: ResQCache, other: ResQCache, columns: int) -> bool:
    """Whether both caches hold the same bytes of the first columns."""
    for a, b in zip(one.layers, other.layers, strict=True):
        used = -(-columns // PAGE)
        left, right = (layer.paged._by_sequence()[:, : used - 1] for layer in (a, b))
        if not torch.equal(left, right):
            return False
    return True


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_have_the_bits_of_ordinary_calls(name: str) -> None:
    family, sizes = MODELS[name]
    model, steps = random_quantized(family, **sizes), 2 * PAGE + 5
    ids = tokens(3, 30 + steps)
    cache, other = filled(model, ids[:, :30]), filled(model, ids[:, :30])
    graph = DecodeGraph(model, cache, steps)
    assert cache.memory_bytes() == other.memory_bytes()  # reserved is not used
    for column in range(30, 30 + steps):
        expected = ordinary(model, other, ids[:, column : column + 1])
        assert torch.equal(graph.step(ids[:, column]), expected), column
        assert cache.get_seq_length() == column + 1
        assert cache.memory_bytes() == other.memory_bytes()
    assert same_pages(cache, other, 30 + steps)
    pages = -(-(30 + steps) // PAGE)
    assert cache.layers[0].paged.pages_per_sequence == pages  # exactly what was asked for


def test_steps_do_without_the_model_s_own_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where somebody would miss it."""
    ids, norm = tokens(2, 20), model.model.norm
    expected = ordinary(model, filled(model, ids[:, :16]), ids[:, 16:17])
    called: list[str] = []

    def see(name: str) -> Any:
        return lambda *_: called.append(name)

    def steps() -> list[str]:
        called.clear()
        graph = DecodeGraph(model, filled(model, ids[:, :16]), 1)
        assert torch.equal(graph.step(ids[:, 16]), expected)
        return called

    places = [("model", model), ("decoder", model.model), ("embedding", model.model.embed_tokens)]
    places += [("norm", norm), ("head", model.lm_head), ("layer", model.model.layers[1])]
    for name, module in places:
        remove = module.register_forward_hook(see(name)).remove
        assert steps().count(name) == 2, name  # the prompt's and the step's
        remove()
        hook = see(name)
        hook.__module__ = "resq_kernels.commands.serve_app"  # of ours, and no less a hook
        remove = module.register_forward_pre_hook(hook).remove
        assert steps().count(name) == 2, name
        remove()
    own = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: called.append("replaced") or own(x))
    assert steps() == ["replaced", "replaced"]
    monkeypatch.undo()

    # transformers' decoder refuses to run: the steps do not need it.
    graph = DecodeGraph(model, filled(model, ids[:, :16]), 1)
    monkeypatch.setattr(type(model.model), "forward", None)
    assert torch.equal(graph.step(ids[:, 16]), expected)


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
@torch.no_grad()
def test_models_whose_layers_are_called_one_by_one(family: str) -> None:
    model, ids = random_quantized(family), tokens(2, 20)
    cache, other = filled(model, ids[:, :16]), filled(model, ids[:, :16])
    graph = DecodeGraph(model, cache, 4)
    for column in range(16, 20):
        expected = ordinary(model, other, ids[:, column : column + 1])
        assert torch.equal(graph.step(ids[:, column]), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_step_as_ordinary_calls(model: Any, side: str) -> None:
    lengths, width, steps = [11, 30, 4], 30, 40
    columns = torch.arange(width)
    mask = torch.stack([columns < n if side == "right" else columns >= width - n for n in lengths])
    ids = tokens(3, width + steps)
    cache, other = (filled(model, ids[:, :width], mask.long()) for _ in range(2))
    graph = DecodeGraph(model, cache, steps)
    for column in range(width, width + steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        part = ids[:, column : column + 1]
        assert torch.equal(graph.step(part[:, 0]), ordinary(model, other, part, mask.long()))
    part, mask = ids[:, :1], torch.nn.functional.pad(mask, (0, 1), value=True).long()
    assert torch.equal(ordinary(model, cache, part, mask), ordinary(model, other, part, mask))


def test_the_cache_is_used_and_cropped_between_steps(model: Any) -> None:
    ids = tokens(2, 80)
    cache, other = filled(model, ids[:, :20]), filled(model, ids[:, :20])
    graph = DecodeGraph(model, cache, 30)
    graph.step(ids[:, 20])
    ordinary(model, cache, ids[:, 21:24])  # several tokens, within the reservation
    graph.step(ids[:, 24])
    cache.crop(-2)
    for column in (23, 24, 25):
        logits = graph.step(ids[:, column])
    ordinary(model, other, ids[:, 20:25])
    assert torch.equal(logits, ordinary(model, other, ids[:, 25:26]))
    # And on its own, past the reservation.
    expected = ordinary(model, other, ids[:, 26:])
    assert torch.equal(ordinary(model, cache, ids[:, 26:]), expected)
    with pytest.raises(RuntimeError, match="expected the pages that were reserved, got others"):
        graph.step(ids[:, 0])
    assert cache.get_seq_length() == 80


def test_logits_of_a_step_outlive_the_next(model: Any) -> None:
    ids = tokens(1, 12)
    graph = DecodeGraph(model, filled(model, ids[:, :9]), 3)
    first = graph.step(ids[:, 9])
    kept = first.clone()
    graph.step(ids[:, 10])
    assert torch.equal(first, kept)


def test_a_step_past_the_reservation_writes_nothing(model: Any) -> None:
    ids = tokens(2, 40)
    cache = filled(model, ids[:, : PAGE - 2])
    graph = DecodeGraph(model, cache, 2)
    for column in (PAGE - 2, PAGE - 1):
        graph.step(ids[:, column])
    before = [layer.paged.pages.clone() for layer in cache.layers]
    sentence = "DecodeGraph: expected at most 32 columns, .* got a step after 32"
    with pytest.raises(RuntimeError, match=sentence):
        graph.step(ids[:, PAGE])
    assert cache.get_seq_length() == PAGE
    pairs = zip(before, cache.layers, strict=True)
    assert all(torch.equal(pages, layer.paged.pages) for pages, layer in pairs)
    again = DecodeGraph(model, cache, 1)
    expected = ordinary(model, filled(model, ids[:, :PAGE]), ids[:, PAGE : PAGE + 1])
    assert torch.equal(again.step(ids[:, PAGE]), expected)


def test_inference_mode_inside_and_outside(model: Any) -> None:
    ids = tokens(1, 10)
    expected = ordinary(model, filled(model, ids[:, :9]), ids[:, 9:])
    for new in (2, 40):  # into the pages of the prompt, and into new ones
        with torch.inference_mode():
            inside = DecodeGraph(model, filled(model, ids[:, :8]), new)
            inside.step(ids[:, 8])
        assert torch.equal(inside.step(ids[:, 9]), expected)
        outside = DecodeGraph(model, filled(model, ids[:, :8]), new)
        outside.step(ids[:, 8])
        with torch.inference_mode():
            assert torch.equal(outside.step(ids[:, 9]), expected)


class Launches(TorchDispatchMode):
    """Counts operators that compute or copy: neither views nor plain allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        returns = [value.alias_info for value in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returns)
        self.count += not (views or "empty" in str(func) or "_unsafe_view" in str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
def test_launches_of_a_layer(batch: int) -> None:
    """The figures of docs/notes/0020-decode-graph.md, of layers that are called one by one: by one
    call there is no operator of torch in between. On CUDA a step has no `ops.decode_step`."""
    ids, steps, calls, one_call = tokens(batch, 20), [], [], []
    prepared: dict[str, list[int]] = {"cpu": [], "cuda": []}
    for depth in (1, 2):
        model = random_quantized("llama", num_hidden_layers=depth)
        cache = filled(model, ids)
        with Launches() as together:
            ordinary(model, cache, ids[:, :1])
        one_call.append(together.count)
        graph = DecodeGraph(model, filled(model, ids), 4)
        for device, counts in prepared.items():
            if device == "cuda":
                graph._step._prepared = None
            with Launches() as step, torch.no_grad():
                graph._pass()
            counts.append(step.count)
        model.model.layers[0].register_forward_hook(lambda module, args, output: None)
        with Launches() as call:
            ordinary(model, cache, ids[:, :1])
        graph = DecodeGraph(model, filled(model, ids), 4)
        with Launches() as step, torch.no_grad():
            graph._pass()
        calls.append(call.count)
        steps.append(step.count)
    assert steps[1] - steps[0] == 11
    assert calls[1] - calls[0] == 11
    assert one_call[1] == one_call[0]
    assert prepared == {"cpu": [5, 5], "cuda": [12, 12]}


def fake_inputs(graph: DecodeGraph, mode: FakeTensorMode) -> None:
    """Tensors without values in place of all that changes from step to step."""
    for name in ("_ids", "_lens", "_cu_seqlens_q"):
        setattr(graph, name, mode.from_tensor(getattr(graph, name)))
    for layer in graph._cache.layers:
        layer.paged.pages = mode.from_tensor(layer.paged.pages)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_nothing_from_the_device(name: str) -> None:
    """A value that is asked for on the host cannot be had from a fake tensor, and would be read
    once, at the capture. The model's own tensors become fake when an operator reads them."""
    family, sizes = MODELS[name]
    model, ids = random_quantized(family, **sizes), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for padding in (None, mask):
        graph = DecodeGraph(model, filled(model, ids, padding), 4)
        fake_inputs(graph, mode)
        with mode, torch.no_grad():
            logits = graph._pass()
        assert logits.shape == (3, model.config.vocab_size)
    # What an ordinary call of a padded batch does: the check must see it.
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    with mode, pytest.raises(DataDependentOutputException):
        ordinary(model, graph._cache, ids[:, :1], longer)


def test_what_cannot_be_prepared_is_refused(model: Any) -> None:
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="expected 2 layers of 4-bit pages that hold tokens"):
        DecodeGraph(model, ResQCache(model.config), 4)
    floats = random_quantized("llama", ResQConfig(kv_bits=16))
    cache = DynamicCache(config=floats.config)
    ordinary(floats, cache, ids)
    with pytest.raises(ValueError, match="model: expected a quantized model with 4-bit keys"):
        DecodeGraph(floats, cache, 4)
    with pytest.raises(ValueError, match="got 2 DynamicLayer after 5 columns"):
        DecodeGraph(model, cache, 4)
    deeper = random_quantized("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="expected 3 layers .* got 2 ResQCacheLayer after 5"):
        DecodeGraph(deeper, filled(model, ids), 4)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        DecodeGraph(model, filled(model, ids), 0)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = random_quantized("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match="do not depend on the length, got 'dynamic'"):
        DecodeGraph(dynamic, filled(dynamic, ids), 4)
    graph = DecodeGraph(model, filled(model, ids), 4)
    for wrong in (ids[:, :1], torch.zeros(2, dtype=torch.int64), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"token_ids: expected int64 \[1\], got "):
            graph.step(wrong)
