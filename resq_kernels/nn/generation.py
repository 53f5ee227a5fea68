"""Greedy search and sampling by prepared steps: what `model.generate` does by itself on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from resq_kernels.nn.decode_graph import DecodeGraph, unsupported_reason
from resq_kernels.nn.decode_step import DecodeStep
from resq_kernels.nn.kv_cache import cache_name
from resq_kernels.nn.layer import family_class

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

CLASSES: dict[type, type] = {}
"""Class of transformers -> what `generating_class` has made of it."""

# Steps that room is made for at first on a CPU; then for as many as the cache holds.
_AHEAD = 256
# What a prepared step needs to know, or has no need of: the criteria have the tokenizer.
_NAMES = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer")
_CACHES = ("cache", "past_key_values")


@torch.no_grad()
def graph_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Greedy search and sampling by `DecodeGraph`: for `model.generate`'s `custom_generate`.

        model.generate(ids, max_new_tokens=100, custom_generate=graph_decoding)

    Returns the same tokens as `generate` without it, for every seed. The cache may be used
    afterwards, as after any `generate`. On a CPU `generate` takes it by itself where it can.

    Args:
        model: a quantized model.
        input_ids: int64 [B, prompt], from the first token of the cache on.
        logits_processor, stopping_criteria, generation_config: as generate makes them.
        streamer: gets the new tokens. transformers 5.24 passes generate's streamer only to its own
            loops: bind it here with `functools.partial` as well.
        kwargs: the cache, under either name, attention_mask [B, prompt], nonzero where a token is,
            and position_ids of the prompt; other arguments of generate are ignored.

    Returns:
        int64 [B, prompt + new tokens].

    Raises:
        ValueError: beam search, or a result other than tokens is asked for.
    """
    if generation_config.num_beams != 1 or generation_config.return_dict_in_generate:
        raise ValueError(
            "graph_decoding: expected one beam and a result of tokens, got "
            f"num_beams={generation_config.num_beams}, "
            f"return_dict_in_generate={generation_config.return_dict_in_generate}"
        )
    name = cache_name(model)
    cache = _cache(kwargs)
    first: dict[str, Any] = {name: cache, "use_cache": True, "logits_to_keep": 1}
    seen = 0 if cache is None else cache.get_seq_length()
    positions = kwargs.get("position_ids")
    if (attention_mask := kwargs.get("attention_mask")) is not None:
        first["attention_mask"] = attention_mask
        if positions is None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    if positions is not None:
        first["position_ids"] = positions[:, seen:]
    out = model(input_ids[:, seen:], **first)
    logits, cache = out.logits[:, -1], out[name]
    graph: DecodeGraph | None = None
    pad = _pad_token(generation_config, stopping_criteria)
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits.float())
        if generation_config.do_sample:
            new = torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
        else:
            new = scores.argmax(dim=-1)
        if pad is not None:
            new = new.where(running, pad)
        input_ids = torch.cat([input_ids, new[:, None]], dim=1)
        if streamer is not None:
            streamer.put(new.cpu())
        running &= ~stopping_criteria(input_ids, None)
        if not running.any():
            break
        if graph is None or graph.room == 0:
            steps = generation_config.max_length - input_ids.shape[1]
            if logits.device.type == "cpu":  # where another graph costs little
                steps = min(steps, max(_AHEAD, cache.get_seq_length()))
            graph = DecodeGraph(model, cache, steps)
        logits = graph.step(new)
    if streamer is not None:
        streamer.end()
    return input_ids


class _SamplesByGraph:
    """Greedy search and sampling by `graph_decoding` on a CPU, where it gives the same.

    A call of the model takes 1.1 ms more than a prepared step (SmolLM2-135M, docs/notes/0056).
    Generation on a GPU would first capture a graph, which only a caller knows to be worth it.
    """

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loop of transformers for greedy search and sampling."""
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not synced_gpus and _does_the_same(self, input_ids, generation_config, kwargs):
            return graph_decoding(self, *given, streamer=streamer, **kwargs)
        return super()._sample(*given, synced_gpus, streamer, **kwargs)  # type: ignore[misc]


def _does_the_same(
    model: Any, input_ids: torch.Tensor, config: GenerationConfig, kwargs: dict[str, Any]
) -> bool:
    """Whether `graph_decoding` does all that is asked for, and by prepared steps."""
    if input_ids.device.type != "cpu" or model.device.type != "cpu":
        return False
    return (
        not config.return_dict_in_generate
        and config.prefill_chunk_size is None
        and kwargs.keys() <= {*_NAMES, *_CACHES}
        and bool(kwargs.get("use_cache"))
        and _counts_tokens(input_ids, kwargs)
        and unsupported_reason(model) is None
        and DecodeStep.layers_of(model) is not None
    )


def _cache(kwargs: dict[str, Any]) -> Any:
    """What is given under one of the cache's names."""
    return next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)


def _counts_tokens(input_ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether all tokens are given, some of them new to the cache, and the next one's position is
    their number in its row."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    cache, count = _cache(kwargs), input_ids.shape[1]
    if positions is None or positions.shape[-1] != count:
        return False
    if cache is not None and cache.get_seq_length() >= count:
        return False
    if mask is None:
        return bool((positions[:, -1] == count - 1).all())
    return mask.shape == input_ids.shape and bool((positions[:, -1] == mask.sum(1) - 1).all())


def _pad_token(config: GenerationConfig, stopping_criteria: Any) -> int | None:
    """What rows that have ended go on with; None if they end all together."""
    if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        return None
    if config.pad_token_id is not None:
        return config.pad_token_id  # type: ignore[no-any-return]
    ends = config.eos_token_id
    return ends[0] if ends and not isinstance(ends, int) else ends  # type: ignore[no-any-return]


def generating_class(kind: type) -> type:
    """What a causal language model of transformers becomes: a class of the same name, in this
    module. Another class stays as it is."""
    if kind is not family_class(kind.__name__, "ForCausalLM"):
        return kind
    if kind not in CLASSES:
        own = {"__doc__": kind.__doc__, "__module__": __name__}
        CLASSES[kind] = type(kind.__name__, (_SamplesByGraph, kind), own)
    return CLASSES[kind]


def __getattr__(name: str) -> type:
    """The class of that name, which a pickled model refers to."""
    kind = family_class(name, "ForCausalLM")
    if kind is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generating_class(kind)
