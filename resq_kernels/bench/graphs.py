"""Whole models and layers as CUDA graphs: ours and transformers' in BF16.

A captured step of transformers needs a cache that does not grow: `OneStep` has room for one token
after its context, and every step writes that one. It costs what a static cache of exactly this
length would, without the mask that transformers adds for longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from resq_kernels.bench.device import Call
from resq_kernels.nn.decode_graph import DecodeGraph


class OneStep(DynamicLayer):
    """A layer of a cache whose last token every step overwrites.

    Args:
        keys, values: [B, n_kv, context, D]; copied.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = pad(keys, (0, 0, 0, 1)), pad(values, (0, 0, 0, 1))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all keys and values, the new ones [B, n_kv, 1, D] as the last token."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The tokens before the step."""
        return self.keys.shape[-2] - 1


def one_step_cache(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache of `OneStep` with the keys and values of these layers."""
    cache = DynamicCache()
    cache.layers = [OneStep(keys, values) for keys, values in layers]
    return cache


def decode_graph(model: Any, cache: Any, token: torch.Tensor) -> Call:
    """A step of a quantized model by `DecodeGraph`, which is undone after each call.

    Args:
        model, cache: a model and its cache, which holds the context.
        token: int64 [B, 1].
    """
    graph = DecodeGraph(model, cache, 1)

    def step(i: int) -> torch.Tensor:
        logits = graph.step(token[:, 0])
        cache.crop(-1)
        return logits[:, None]

    return step


def errors(result: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|result - expected| / |expected| of each token of [batch, tokens, columns], on the CPU."""
    result, expected = result.cpu().double(), expected.cpu().double()
    return (result - expected).norm(dim=-1) / expected.norm(dim=-1)


def added(
    eager: Mapping[str, Call],
    captured: Mapping[str, Callable[[], Call]],
    tolerance: float,
    missing: dict[str, str],
) -> dict[str, Call]:
    """The candidates to time on a GPU: "ours" is our graph; the eager calls and the other graphs
    are its baselines.

    Args:
        eager: "ours" and baselines as Python calls them; all return logits [B, 1, vocabulary].
        captured: key of `eager` -> function that captures the call as a graph.
        tolerance: most difference between a graph and its eager call, relative to the norm of the
            eager logits of a row.
        missing: receives the reason for each baseline that cannot be captured.

    Raises:
        RuntimeError: a graph's logits differ from the eager call's, or ours cannot be captured.
    """
    found: dict[str, Call] = {}
    for key, make in captured.items():
        name = key if key == "ours" else f"{key} graph"
        try:
            call = make()
        except RuntimeError as error:
            if key == "ours":
                raise
            missing[name] = str(error).strip().splitlines()[0][:200]
            continue
        expected, result = (candidate(0) for candidate in (eager[key], call))
        if not (apart := float(errors(result, expected).max())) <= tolerance:
            raise RuntimeError(f"{name}: differs from the eager call by {apart:.2g} of the norm")
        found[name] = call
    baselines = {"ours eager" if key == "ours" else key: call for key, call in eager.items()}
    return {"ours": found.pop("ours"), **baselines, **found}
