"""One state for the layers of a cache, and the metadata of a pass made once for all of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from resq_kernels import DecodeGraph, ResQCache, ops
from resq_kernels.nn.batch import AttentionMetadata, Batch, BatchState, ForwardPass
from resq_kernels.nn.paged import PagedKeysValues
from resq_kernels.testing.quantized_models import head_input, random_quantized

CPU, META = torch.device("cpu"), torch.device("meta")
CACHES = {
    "ours": lambda model: ResQCache(model.config),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "lazy dynamic": lambda model: DynamicCache(),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_quantized("llama", num_hidden_layers=3)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(3))


def padding(batch: int, columns: int) -> torch.Tensor:
    """The second sequence is four tokens shorter, padded on the left."""
    mask = torch.ones(batch, columns, dtype=torch.long)
    mask[1, :4] = 0
    return mask


@torch.no_grad()
def hidden(model: Any, ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    use = {} if cache is None else {"past_key_values": cache}
    return head_input(model, ids, use_cache=cache is not None, **use, **kwargs)


@torch.no_grad()
def layer_by_layer(
    model: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`hidden` by calls of single layers, which are not told that they are one pass."""
    decoder, seen = model.model, cache.get_seq_length()
    x = decoder.embed_tokens(ids, rotated=True)
    positions = torch.arange(seen, seen + ids.shape[1])[None]
    rope = decoder.rotary_emb(x, positions)
    for layer in decoder.layers:
        x = layer(x, attention_mask=mask, position_embeddings=rope, cache=cache)
    return decoder.norm(x)


def each_layer(name: str, *args: Any) -> Callable[[Any], None]:
    """A change of a cache, asked of its layers one after the other."""
    return lambda cache: [getattr(layer, name)(*args) for layer in cache.layers]


def whole(name: str, *args: Any) -> Callable[[Any], None]:
    return lambda cache: getattr(cache, name)(*args)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a pass makes what its layers share, and the RoPE tensors that they got."""
    counts: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        right = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(BatchState, "append")
    count(AttentionMetadata, "with_rope")
    append, layers = ops.kv_append, ops.decoder_layers

    def together(x: Any, cos: torch.Tensor, sin: Any, caches: Any, *args: Any) -> Any:
        assert cos.is_contiguous() and len(cos) == len(x)
        counts[f"cos at {cos.data_ptr()}"] += len(caches)
        return layers(x, cos, sin, caches, *args)

    def seen(k: Any, v: Any, cos: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert cos.is_contiguous() and len(cos) == len(k)
        counts[f"cos at {cos.data_ptr()}"] += 1
        return append(k, v, cos, *args, **kwargs)

    monkeypatch.setattr(ops, "kv_append", seen)
    monkeypatch.setattr(ops, "decoder_layers", together)
    return counts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [None, *CACHES])
def test_metadata_is_made_once_a_pass(
    model: Any, name: str | None, padded: bool, made: Counter[str]
) -> None:
    ids, mask = tokens(3, 12), padding(3, 12) if padded else None
    cache = None if name is None else CACHES[name](model)
    for end in (12,) if cache is None else (8, 11, 12):
        made.clear()
        start = 0 if cache is None else cache.get_seq_length()
        given = None if mask is None else mask[:, :end]
        hidden(model, ids[:, start:end], cache, attention_mask=given)
        assert made.pop("append") == 1 and made.pop("with_rope") == 1
        assert list(made.values()) == [3]  # every layer reads the same rows of cos
        if cache is not None:
            assert {id(layer.batch) for layer in cache.layers} == {id(cache.layers[0].batch)}
            assert cache.layers[0].batch.state.length == end


def test_a_prepared_step_makes_none(model: Any, made: Counter[str]) -> None:
    ids, cache = tokens(2, 12), ResQCache(model.config)
    hidden(model, ids[:, :9], cache)
    graph = DecodeGraph(model, cache, 1)
    made.clear()
    graph.step(ids[:, 9])
    assert not made
    remove = model.model.layers[1].register_forward_hook(lambda *_: None).remove
    graph = DecodeGraph(model, cache, 2)  # by calls of the model
    remove()
    made.clear()
    graph.step(ids[:, 10])
    assert "append" not in made and made.pop("with_rope") == 1 and list(made.values()) == [3]
    assert cache.batch.state.length == 11


def test_a_compiled_pass_fills_a_cache_as_one_graph() -> None:
    torch._dynamo.reset()
    model, ids = random_quantized("qwen2", num_hidden_layers=2), tokens(2, 12)
    cache, other = ResQCache(model.config), ResQCache(model.config)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    for start, end in ((0, 10), (10, 11), (11, 12)):
        with torch.no_grad():
            out = compiled(ids[:, start:end], past_key_values=cache, use_cache=True)
        expected = hidden(model, ids[:, start:end], other)
        restored = model.model.hidden_basis.restore_normed(expected)
        assert torch.equal(out.last_hidden_state, restored)
        assert cache.batch.state.length == cache.get_seq_length(1) == end


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_layers_that_are_called_singly_catch_up(model: Any, name: str, padded: bool) -> None:
    ids, mask = tokens(2, 20), padding(2, 20).bool() if padded else None
    cache, other = CACHES[name](model), CACHES[name](model)
    for start, end in ((0, 9), (9, 10), (10, 20)):
        given = None if mask is None else mask[:, :end]
        got = layer_by_layer(model, ids[:, start:end], cache, given)
        options = {"attention_mask": given, "position_ids": torch.arange(start, end)[None]}
        assert torch.equal(got, hidden(model, ids[:, start:end], other, **options))
    # And all chunks of a layer before the first of the next.
    x = torch.randn(2, 20, 128)
    rope = model.model.rotary_emb(x, torch.arange(20)[None])
    third, whole_cache = CACHES[name](model), CACHES[name](model)
    for layer in model.model.layers:
        expected = layer(x, mask, position_embeddings=rope, cache=whole_cache)
        parts = []
        for start, end in ((0, 7), (7, 20)):
            part = tuple(t[:, start:end] for t in rope)
            given = None if mask is None else mask[:, :end]
            own = x[:, start:end]
            parts.append(layer(own, given, position_embeddings=part, cache=third))
        assert torch.equal(torch.cat(parts, dim=1), expected)
        x = expected


def test_a_layer_that_catches_up_with_other_padding_is_refused(model: Any) -> None:
    layers, cache = model.model.layers, ResQCache(model.config)
    x = torch.randn(2, 6, 128)
    rope, mask = model.model.rotary_emb(x, torch.arange(6)[None]), padding(2, 6).bool()
    layers[0](x, mask, position_embeddings=rope, cache=cache)
    for other in (None, mask.flip(0)):
        with pytest.raises(ValueError, match="expected the padding that the other layers"):
            layers[1](x, other, position_embeddings=rope, cache=cache)
    layers[1](x, mask, position_embeddings=rope, cache=cache)
    assert cache.get_seq_length(1) == 6 and cache.get_seq_length(2) == 0


TWICE: dict[str, list[tuple[Any, ...]]] = {
    "crop": [(-3,), (-2,)],
    "reset": [(), ()],
    "reorder_cache": [(torch.tensor([1, 1, 0]),), (torch.tensor([2, 0, 1]),)],
    "batch_select_indices": [(torch.tensor([2, 1]),), (torch.tensor([1, 0]),)],
    "batch_repeat_interleave": [(2,), (2,)],
}


def seen_after(mask: torch.Tensor, change: str, *args: Any) -> torch.Tensor:
    """What a change does to the columns and sequences that a cache has seen, [B, columns]."""
    match change:
        case "crop":
            return mask[:, : args[0]]
        case "reset":
            return mask[:, :0]
        case "batch_repeat_interleave":
            return mask.repeat_interleave(args[0], dim=0)
        case _:
            return mask[args[0]]


@pytest.mark.parametrize("by", [whole, each_layer], ids=["whole", "by layer"])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("change", TWICE)
def test_a_change_of_all_layers_is_one_change(model: Any, change: str, name: str, by: Any) -> None:
    """A state that is changed once a layer, or by none but the first change, has another mask."""
    ids, mask = tokens(3, 20), padding(3, 20)
    cache, expected = CACHES[name](model), CACHES[name](model)
    hidden(model, ids[:, :12], cache, attention_mask=mask[:, :12])
    seen = torch.arange(3 * 20).view(3, 20)[:, :12]
    for args in TWICE[change]:
        by(change, *args)(cache)
        seen = seen_after(seen, change, *args)
        (state,) = {layer.batch.state for layer in cache.layers}
        assert state.length == cache.get_seq_length() == seen.shape[1]
        if change != "reset":
            assert torch.equal(state.valid, mask.flatten()[seen].bool())
    start, rows = seen.shape[1], seen[:, 0] // 20 if change != "reset" else torch.arange(3)
    if start:
        hidden(model, ids[rows, :start], expected, attention_mask=mask[rows, :start])
    for begin, end in ((start, start + 1), (start + 1, 20)):
        part, given = ids[rows, begin:end], mask[rows, :end]
        got = hidden(model, part, cache, attention_mask=given)
        assert torch.equal(got, hidden(model, part, expected, attention_mask=given))


def test_layers_without_tokens_do_not_count(model: Any) -> None:
    """A cache may have more layers than the model that uses it (early exit): they hold nothing."""
    shallow = random_quantized("llama", num_hidden_layers=2)
    ids, mask = tokens(2, 14), padding(2, 14)
    cache, other = ResQCache(model.config), ResQCache(shallow.config)
    for one in (cache, other):
        hidden(shallow, ids[:, :10], one, attention_mask=mask[:, :10])
        one.crop(-4)
        one.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 6 and cache.get_seq_length(2) == 0
    rows = [1, 0]
    options = {"attention_mask": mask[rows]}
    got, expected = (hidden(shallow, ids[rows, 6:], one, **options) for one in (cache, other))
    assert torch.equal(got, expected)
    with pytest.raises(
        ValueError, match="with the 14 columns that the batch has seen, got one with 0"
    ):
        hidden(model, ids[:, :1], cache, attention_mask=torch.cat([mask[rows], mask[:, :1]], 1))


@pytest.mark.parametrize("name", CACHES)
def test_copies_share_nothing_with_the_original(model: Any, name: str) -> None:
    ids, mask = tokens(2, 14), padding(2, 14)
    positions = torch.arange(14)[None]
    expected = hidden(model, ids, attention_mask=mask, position_ids=positions)
    cache = CACHES[name](model)
    hidden(model, ids[:, :9], cache, attention_mask=mask[:, :9])
    other = copy.deepcopy(cache)
    (batch,) = {layer.batch for layer in other.layers}
    assert batch is not cache.layers[0].batch
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert batch.state.length == 9 and batch.changes == 0
    for start, end in ((9, 11), (11, 14)):
        got = hidden(model, ids[:, start:end], other, attention_mask=mask[:, :end])
        assert torch.equal(got, expected[:, start:end])
    assert cache.get_seq_length() == 7


def test_a_copy_of_a_cache_that_grows_shares_its_own_state(model: Any) -> None:
    x, cache = torch.randn(1, 3, 128), DynamicCache()
    rope = model.model.rotary_emb(x, torch.arange(3)[None])
    model.model.layers[0](x, position_embeddings=rope, cache=cache)
    grown = copy.deepcopy(cache)
    model.model.layers[1](x, position_embeddings=rope, cache=grown)
    first, second = grown.layers
    assert len(cache.layers) == 1 and first.batch is second.batch is not cache.layers[0].batch


@pytest.mark.parametrize("change", ["crop", "batch_select_indices"])
def test_a_layer_that_is_left_out_of_a_change_is_noticed(model: Any, change: str) -> None:
    ids, cache = tokens(3, 9), ResQCache(model.config)
    hidden(model, ids[:, :8], cache)
    getattr(cache.layers[0], change)(-1 if change == "crop" else torch.tensor([2, 0, 1]))
    with pytest.raises(ValueError, match="expected all layers cropped and selected alike"):
        hidden(model, ids[:, 8:], cache)
    cache.reset()
    assert torch.equal(hidden(model, ids, cache), hidden(model, ids))


def test_a_graph_notices_layers_of_different_lengths(model: Any) -> None:
    ids, cache = tokens(1, 9), ResQCache(model.config)
    hidden(model, ids[:, :8], cache)
    graph = DecodeGraph(model, cache, 2)
    cache.layers[1].crop(-1)
    with pytest.raises(RuntimeError, match="or layers of different lengths"):
        graph.step(ids[:, 8])
    with pytest.raises(ValueError, match="got 3 ResQCacheLayer after 7 and 8 columns"):
        DecodeGraph(model, cache, 2)


def test_a_refused_selection_changes_nothing(model: Any) -> None:
    ids, mask, cache = tokens(2, 10), padding(2, 10), ResQCache(model.config)
    hidden(model, ids[:, :8], cache, attention_mask=mask[:, :8])
    with pytest.raises((IndexError, RuntimeError)):
        cache.batch_select_indices(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="expected the negative number"):
        cache.crop(1)
    options = {"attention_mask": mask, "position_ids": torch.arange(8, 10)[None]}
    got = hidden(model, ids[:, 8:], cache, **options)
    assert torch.equal(
        got, hidden(model, ids, attention_mask=mask, position_ids=torch.arange(10)[None])[:, 8:]
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_that_was_interrupted(
    model: Any, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first layer, before anything is stored: as if it had not been. Later: noticed."""
    ids, cache = tokens(2, 10), ResQCache(model.config)
    singly = model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    hidden(model, ids[:, :7], cache)

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[layer].paged, "append", fails)
        with pytest.raises(torch.OutOfMemoryError):
            hidden(model, ids[:, 7:9], cache)
    singly.remove()
    if layer == 0:
        assert cache.get_seq_length() == 7 and cache.batch.state.length == 7
    else:
        with pytest.raises(
            ValueError, match="with the 9 columns that the batch has seen, got one with 7"
        ):
            hidden(model, ids[:, 9:], cache)
        cache.reset()
    start = cache.get_seq_length()
    assert torch.equal(hidden(model, ids[:, start:], cache), hidden(model, ids)[:, start:])


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_of_all_layers_that_was_interrupted(
    model: Any, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is made for all layers before the first of them stores anything."""
    ids, cache = tokens(2, 70), ResQCache(model.config, 32)
    hidden(model, ids[:, :7], cache)

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[layer].paged, "_grow", fails)
        with pytest.raises(torch.OutOfMemoryError):
            hidden(model, ids[:, 7:], cache)
    assert cache.get_seq_length() == 7 and cache.batch.state.length == 7
    assert torch.equal(hidden(model, ids[:, 7:], cache), hidden(model, ids)[:, 7:])


def test_another_batch_than_the_cache_s_is_refused(model: Any) -> None:
    ids, cache = tokens(3, 10), ResQCache(model.config)
    hidden(model, ids[:, :8], cache)
    with pytest.raises(ValueError, match="expected the sequences that the cache holds, 3, got 2"):
        hidden(model, ids[:2, 8:], cache)
    cache.crop(-8)
    assert torch.equal(hidden(model, ids[:2], cache), hidden(model, ids[:2]))  # nothing is held


def test_another_batch_than_a_padded_cache_s_is_refused(model: Any) -> None:
    ids, mask, cache = tokens(3, 10), padding(3, 10), ResQCache(model.config)
    hidden(model, ids[:, :8], cache, attention_mask=mask[:, :8])
    with pytest.raises(ValueError, match="expected the 3 sequences that it holds, got 2"):
        hidden(model, ids[:2, 8:], cache)
    cache.crop(-8)
    assert torch.equal(hidden(model, ids[:2], cache), hidden(model, ids[:2]))  # nothing is held


def test_a_pass_cannot_be_taken_twice(model: Any) -> None:
    ids, cache, forward_pass = tokens(1, 8), ResQCache(model.config), ForwardPass()
    hidden(model, ids[:, :4], cache, forward_pass=forward_pass)
    with pytest.raises(
        ValueError, match="with the 0 columns that the batch has seen, got one with 4"
    ):
        hidden(model, ids[:, 4:], cache, forward_pass=forward_pass)


def test_layers_on_several_devices_share_one_change(made: Counter[str]) -> None:
    """The second device gets a copy of what the first one made."""
    batch, forward_pass, mask = Batch(), ForwardPass(), padding(2, 5).bool()
    rope = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    here = forward_pass.metadata(batch, 0, (2, 5), mask, *rope)
    batch.advance(here)
    there = forward_pass.metadata(batch, 0, (2, 5), mask.to(META), *(x.to(META) for x in rope))
    batch.advance(there)
    assert forward_pass.metadata(batch, 0, (2, 5), mask, *rope) is here
    assert made["append"] == 1 and there is not here and there.after is here.after
    assert batch.state is here.after and batch.state.length == 5
    for name in ("positions", "rows", "seq_lens", "cu_seqlens_q", "cos", "sin"):
        one, other = getattr(here, name), getattr(there, name)
        assert (one.device, other.device, one.shape) == (CPU, META, other.shape), name
    assert there.slots(64).device == META and there.block_table(2).device == META


def test_metadata_of_a_padded_pass() -> None:
    metadata = BatchState().append(1, 3, torch.tensor([[0, 1, 1]]), CPU)
    assert metadata.positions.tolist() == [-1, 0, 1] and metadata.rows.tolist() == [1, 2]
    assert metadata.seq_lens.tolist() == [2] and metadata.cu_seqlens_q.tolist() == [0, 2]
    assert metadata.slots(64).tolist() == [-1, 0, 1]
    assert metadata.slots(64) is metadata.slots(64)
    assert metadata.block_table(2).tolist() == [[0, 1]]
    with pytest.raises(AttributeError):
        metadata.start = 1


def test_pages_of_a_pass_without_a_start_must_have_been_reserved() -> None:
    prepared = AttentionMetadata(torch.zeros(1).long(), None, torch.ones(1).int(), torch.arange(2))
    k = torch.randn(1, 1, 64)
    with pytest.raises(RuntimeError, match="expected pages, got none"):
        PagedKeysValues().append(prepared, k, k, None, 8)
