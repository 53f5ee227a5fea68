"""ResQCache: the 4-bit paged KV cache as a transformers cache."""

from __future__ import annotations

import inspect
from functools import partial
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from resq_kernels.kv_pages import DEFAULT_PAGE_SIZE
from resq_kernels.nn.batch import Batch
from resq_kernels.nn.paged import PagedKeysValues


class ResQCacheLayer(CacheLayerMixin):
    """One layer of a `ResQCache`: pages, filled by `ResQAttention`.

    `keys`, `values` and `is_initialized` of the base class stay None and False: there are no float
    tensors to offload or to zero.

    Attributes:
        batch: the state of the batch; the same object for all layers of a cache.
        paged: the pages of this layer.
        changes: number of the batch's changes that this layer has made.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, batch: Batch, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        super().__init__()
        self.batch, self.changes = batch, batch.changes
        self.paged = PagedKeysValues(page_size)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the first append reserves the pages."""

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuses: float keys and values do not enter a paged cache.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ResQCache: update: expected a model with 4-bit keys and values, whose attention fills "
            "the pages itself; other models need another cache, such as DynamicCache"
        )

    def get_seq_length(self) -> int:
        """Columns that this layer holds, padding included."""
        return self.paged.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the mask of a pass with `query_length` new columns: (its columns, the first one)."""
        return self.paged.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.23

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns; the count is negative, as in transformers >= 5.17.

        Raises:
            ValueError: the count is positive, which in older versions was the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "ResQCache: crop: expected the negative number of tokens to remove, "
                f"got {tokens_to_remove}"
            )
        self.changes = self.batch.change(
            self.changes, lambda state: state.first(max(state.length + tokens_to_remove, 0))
        )
        self.paged.length = max(self.paged.length + tokens_to_remove, 0)

    def reset(self) -> None:
        """Forgets everything and frees the pages."""
        self.batch.reset()
        self.changes = 0
        self.paged.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence b becomes a copy of sequence beam_idx[b] (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices` int64 [B'], in that order."""
        self.paged.select(indices)  # first: it raises for invalid indices
        self.changes = self.batch.change(self.changes, lambda state: state.select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times in a row."""
        self.paged.repeat_interleave(repeats)
        self.changes = self.batch.change(
            self.changes, lambda state: state.repeat_interleave(repeats)
        )


class ResQCache(Cache):
    """A KV cache of 160 bytes per token and kv head (88 at head_dim 64) instead of 512 (256).

    A quantized model makes one itself whenever it uses a cache. Make one yourself only to keep a
    cache between calls: `model.generate(..., cache=cache)` (`past_key_values=` before
    transformers 5.24).

    Args:
        config: the model's configuration, for the number of layers.
        page_size: tokens a page, a multiple of 16 (32 at head_dim 64).

    Source: docs/formats.md, section 5.
    """

    def __init__(self, config: PreTrainedConfig, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        self.batch = Batch()
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[ResQCacheLayer(self.batch, page_size) for _ in range(count)])

    def memory_bytes(self, reserved: bool = False) -> int:
        """Bytes of the pages that hold tokens; with `reserved`, of those kept for growth too."""
        return sum(layer.paged.memory_bytes(reserved) for layer in self.layers)


def cache_name(model: nn.Module) -> str:
    """The argument under which a model or decoder layer takes its cache; 5.24 renamed it."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def paged_layer(cache: Cache, index: int) -> ResQCacheLayer:
    """The paged layer `index` of a cache; an empty `DynamicCache` becomes a paged one first.

    Raises:
        ValueError: another kind of cache, one that holds float keys and values, or a layer that
            missed a change of its cache.
    """
    if index >= len(cache.layers) or not isinstance(cache.layers[index], ResQCacheLayer):
        _adopt(cache, index)
    layer: ResQCacheLayer = cache.layers[index]
    if layer.changes != layer.batch.changes:
        raise ValueError(
            "ResQAttention: cache: expected all layers cropped and selected alike, got layer "
            f"{index} after {layer.changes} of {layer.batch.changes} changes: reset the cache"
        )
    return layer


def _adopt(cache: Cache, index: int) -> None:
    """Puts paged layers in place of the empty float layers of a `DynamicCache`.

    `generate`, and a forward pass with `use_cache`, make a `DynamicCache` on their own. Its layers
    are replaced on first use, so that no caller has to know about pages.
    """
    paged = [layer for layer in cache.layers if isinstance(layer, ResQCacheLayer)]
    batch = paged[0].batch if paged else Batch()
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, ResQCacheLayer):
            continue
        if type(layer) is not DynamicLayer or layer.is_initialized or cache.offloading:
            state = "filled" if layer.is_initialized else "empty"
            where = ", offloaded" if cache.offloading else ""
            raise ValueError(
                "ResQAttention: cache: expected a ResQCache or an empty DynamicCache, "
                f"got a {type(cache).__name__} with a {state} {type(layer).__name__}{where}; "
                "leave it and cache_implementation out to get a 4-bit cache"
            )
        cache.layers[at] = ResQCacheLayer(batch)
    if cache.layer_class_to_replicate is DynamicLayer:
        # Made without a configuration, the cache grows layer by layer.
        cache.layer_class_to_replicate = partial(ResQCacheLayer, batch)
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
