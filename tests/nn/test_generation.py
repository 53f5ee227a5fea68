"""`model.generate` on a CPU: by prepared steps where they do the same, else by transformers."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    Qwen2ForCausalLM,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
)

from resq_kernels import ResQCache, graph_decoding
from resq_kernels.nn import generation
from resq_kernels.nn.decode_graph import DecodeGraph
from resq_kernels.nn.kv_cache import cache_name
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_tokenizer

NEW = 40


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_quantized(request.param)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps that every `DecodeGraph` is made for."""
    made: list[int] = []
    init = DecodeGraph.__init__

    def record(self: DecodeGraph, model: Any, cache: Any, steps: int) -> None:
        made.append(steps)
        init(self, model, cache, steps)

    monkeypatch.setattr(DecodeGraph, "__init__", record)
    yield made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(7))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(5)
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": NEW}
    # Two, so that there is a step: the first token of a random model may be the last.
    return model.generate(ids, **{**given, "min_new_tokens": 2, "do_sample": False, **options})


def by_transformers(call: Callable[[], Any]) -> Any:
    """What `call` returns where nothing is prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_does_the_same", lambda *given: False)
        return call()


SAMPLING = [
    {},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0},
    {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 3, "eos_token_id": list(range(0, 320, 40))},
    {"stop_strings": ["e", "t", "a", "i"], "tokenizer": make_tokenizer()},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda options: " ".join(options) or "greedy")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_the_same_tokens(
    model: Any, graphs: list[int], options: dict[str, Any], padded: bool
) -> None:
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = mask[2, :19] = 0
    given = {"attention_mask": mask, **options}
    expected = by_transformers(lambda: generate(model, ids * mask, **given))
    assert graphs == []
    assert torch.equal(generate(model, ids * mask, **given), expected)
    assert graphs != []
    if "tokenizer" not in given:  # which transformers drops there
        by_name = generate(model, ids * mask, custom_generate=graph_decoding, **given)
        assert torch.equal(by_name, expected)


def test_room_is_made_as_it_is_needed(
    model: Any, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a limit that is never reached costs no memory."""
    ids = tokens(2, 5)
    expected = by_transformers(lambda: generate(model, ids, min_new_tokens=NEW))
    monkeypatch.setattr(generation, "_AHEAD", 3)
    assert torch.equal(generate(model, ids, min_new_tokens=NEW), expected)
    assert graphs == [5, 10, 20, 4]  # after 5, 10, 20 and 40 columns, 39 steps in all
    graphs.clear()
    until = {"min_new_tokens": 9, "stopping_criteria": [Until(12)]}
    generate(model, ids, max_new_tokens=100_000, **until)
    assert graphs == [5, 10]


class Until(StoppingCriteria):
    """Ends all rows at a length; `only` a row, a token later than it would otherwise."""

    def __init__(self, length: int, only: int | None = None) -> None:
        self.length, self.only = length, only

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        if self.only is not None:
            done &= torch.arange(len(done)) == self.only
        return done


def test_rows_that_end_without_an_end_token_are_not_padded(model: Any, graphs: list[int]) -> None:
    ids = tokens(3, 8)
    options = {"stopping_criteria": [Until(12, only=1)], "eos_token_id": None}
    expected = by_transformers(lambda: generate(model, ids, **options))
    assert (expected[1, 12:] != 0).any()
    for extra in ({}, {"custom_generate": graph_decoding}):
        assert torch.equal(generate(model, ids, **options, **extra), expected)
    assert len(graphs) == 2


def test_a_streamer_gets_the_tokens(model: Any, graphs: list[int]) -> None:
    class Streamer(TextStreamer):
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.got.append("end")

    ids, streams = tokens(1, 6), (Streamer(), Streamer())
    by_transformers(lambda: generate(model, ids, streamer=streams[0]))
    out = generate(model, ids, streamer=streams[1])
    assert streams[0].got == streams[1].got and len(graphs) == 1
    assert streams[1].got == [ids[0].tolist(), *([one] for one in out[0, 6:].tolist()), "end"]


def test_a_cache_goes_on(model: Any, graphs: list[int]) -> None:
    ids = tokens(1, 9)
    cache = ResQCache(model.config)
    first = generate(model, ids, **{cache_name(model): cache})
    longer = torch.cat([first, tokens(1, 5)], dim=1)
    got = generate(model, longer, **{cache_name(model): cache})
    assert len(graphs) == 2
    assert torch.equal(got, by_transformers(lambda: generate(model, longer)))
    assert cache.get_seq_length() == got.shape[1] - 1
    given = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, **{cache_name(model): given}), first)
    assert given.get_seq_length() == first.shape[1] - 1


def after(model: Any, ids: torch.Tensor) -> ResQCache:
    cache = ResQCache(model.config)
    with torch.no_grad():
        model(ids, **{cache_name(model): cache, "use_cache": True})
    return cache


OTHERS: dict[str, Callable[[Any, torch.Tensor], dict[str, Any]]] = {
    "beams": lambda model, ids: {"num_beams": 2},
    "scores": lambda model, ids: {"return_dict_in_generate": True, "output_scores": True},
    "no cache": lambda model, ids: {"use_cache": False},
    "chunks of the prompt": lambda model, ids: {"prefill_chunk_size": 4},
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)},
    "positions": lambda model, ids: {"position_ids": torch.arange(ids.shape[1])[None] * 2},
    "right padding": lambda model, ids: {
        "attention_mask": (torch.arange(ids.shape[1]) < 8).long().expand_as(ids)
    },
    "ranks that wait": lambda model, ids: {"synced_gpus": True},
    "a draft": lambda model, ids: {"assistant_model": model},
    "no new tokens": lambda model, ids: {cache_name(model): after(model, ids)},
    "the new tokens alone": lambda model, ids: {
        cache_name(model): after(model, tokens(2, 3)),
        "attention_mask": torch.ones(2, 3 + ids.shape[1], dtype=torch.int64),
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_prepared_steps_do_not_do_is_done(
    model: Any, graphs: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given, **options: None)
    rows = 1 if name == "a draft" else 2
    ids = tokens(rows, 10)
    options = OTHERS[name]
    expected = by_transformers(lambda: generate(model, ids, **options(model, ids)))
    got = generate(model, ids, **options(model, ids))
    assert graphs == []
    if name == "scores":
        assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)


def test_what_is_refused_stays_refused(model: Any) -> None:
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="output_attentions: expected False, got True"):
        generate(model, ids, output_attentions=True)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(Exception) as theirs:
        by_transformers(lambda: generate(model, ids, **{cache_name(model): static}))
    with pytest.raises(type(theirs.value)) as ours:
        generate(model, ids, **{cache_name(model): static})
    assert str(ours.value) == str(theirs.value)
    for options in ({"num_beams": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="graph_decoding: expected one beam and a result of"):
            generate(model, ids, custom_generate=graph_decoding, **options)


def test_hooks_see_every_token(model: Any, graphs: list[int]) -> None:
    seen: list[int] = []
    layer = model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    try:
        out = generate(model, tokens(1, 7), min_new_tokens=NEW)
    finally:
        handle.remove()
    assert seen == [7, *[1] * (NEW - 1)] and graphs == []
    again = generate(model, tokens(1, 7), min_new_tokens=NEW)
    assert torch.equal(again, out) and len(graphs) == 1


def test_a_processor_changes_the_model_s_mind(model: Any, graphs: list[int]) -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, torch.arange(scores.shape[1] - 9), float("-inf"))

    out = generate(model, tokens(2, 7), logits_processor=[Only()])
    assert (out[:, 7:] >= model.config.vocab_size - 9).all() and len(graphs) == 1


def test_several_threads_generate_at_once(model: Any, graphs: list[int]) -> None:
    prompts = [tokens(1, 5 + row) for row in range(4)]
    expected = [generate(model, prompt) for prompt in prompts]
    got: list[Any] = [None] * len(prompts)

    def run(row: int) -> None:
        got[row] = generate(model, prompts[row])

    threads = [threading.Thread(target=run, args=(row,)) for row in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(graphs) == 8


def test_the_class_is_that_of_transformers(model: Any, tmp_path: Any) -> None:
    kinds = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
    kind = kinds[model.config.model_type]
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert type(model).can_generate() and generation.generating_class(kind) is type(model)
    model.save_pretrained(tmp_path)
    assert f'"{kind.__name__}"' in (tmp_path / "config.json").read_text()
    ids = tokens(1, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(generate(twin, ids), generate(model, ids))
    with pytest.raises(AttributeError, match="no attribute 'BertForCausalLM'"):
        _ = generation.BertForCausalLM
