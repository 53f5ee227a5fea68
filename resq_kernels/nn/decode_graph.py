"""DecodeGraph: decodes one token of every sequence by a step that is prepared once.

On CUDA that is a graph instead of Python's launches. A step must repeat the same launches on the
same addresses. Whatever changes from step to step therefore lives in tensors that the step itself
advances: tokens, lengths, and the positions and slots that it computes from the lengths. Pages are
reserved beforehand (docs/notes/0020-decode-graph.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from resq_kernels.nn.attention import ResQAttention
from resq_kernels.nn.batch import AttentionMetadata, BatchState, ForwardPass
from resq_kernels.nn.decode_step import DecodeStep
from resq_kernels.nn.kv_cache import ResQCacheLayer, cache_name
from resq_kernels.nn.tensor_parallel import parallel_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

# Passes before the capture: the first loads kernels and makes workspaces; the second runs under the
# same conditions as the captured one.
WARMUPS = 2
# RoPE whose frequencies depend on the longest position: transformers reads it on the host.
HOST_ROPE = ("dynamic", "longrope")


class DecodeGraph:
    """Decode steps of a quantized model that read nothing back from the device and need no Python.

    On CUDA a step is captured once and replayed; on a CPU Python runs the same step, for a small
    model in three quarters of the time of its call (docs/notes/0056). Logits and cache have the
    bits of an ordinary call. Between steps the cache may be used and cropped as usual. The step
    uses the weights, modules and hooks that the model has at construction: a model that is moved,
    cast, loaded or changed afterwards needs another `DecodeGraph`.

    Args:
        model: a quantized `LlamaForCausalLM` or `Qwen2ForCausalLM`.
        cache: the model's cache with 4-bit pages, after at least one pass. Padding in the prompt
            is fine. Every column that a step appends counts as a token, even in sequences that
            have ended.
        max_new_tokens: number of steps to reserve pages for.

    Raises:
        ValueError: a model that is not quantized, is on more than one device, is shared by ranks,
            or has a RoPE that depends on the length; a cache that is empty, is not of 4-bit pages,
            or is not of this model; max_new_tokens < 1.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, max_new_tokens: int) -> None:
        layers = _checked_layers(model, cache, max_new_tokens)
        self._model, self._cache = model, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch, paged = layers[0].batch, layers[0].paged
        state = self._batch.state
        self._limit = state.length + max_new_tokens
        pages = paged.held()
        batch, device = len(pages) // paged.pages_per_sequence, pages.device
        # Later steps use these tensors too, possibly outside of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                layer.paged.reserve(self._limit)
            self._pages = [layer.paged.pages for layer in layers]
            self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._lens = torch.zeros(batch, dtype=torch.int32, device=device)
            self._cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
            self._step = DecodeStep.of(model, layers, self._limit, self._metadata())
            self._arguments = {cache_name(model): cache, "use_cache": True, "logits_to_keep": 1}
            if device.type == "cuda":
                self._capture(state)
            self._place(state)
        self._account(state)

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Appends one token to every sequence and returns the logits that follow it.

        Args:
            token_ids: int32 or int64 [B].

        Returns:
            [B, vocabulary] in the model's dtype.

        Raises:
            ValueError: token_ids has another shape or dtype.
            RuntimeError: there is no room left, or the cache has other pages than at construction.
                Nothing is written.
        """
        state = self._batch.state
        integers = token_ids.dtype in (torch.int32, torch.int64)
        if token_ids.shape != self._ids.shape[:1] or not integers:
            raise ValueError(
                f"DecodeGraph: token_ids: expected int64 [{len(self._ids)}], got "
                f"{token_ids.dtype} {list(token_ids.shape)}".replace("torch.", "")
            )
        held = [layer.paged for layer in self._cache.layers]
        if any(
            paged.pages is not pages or paged.length != state.length
            for paged, pages in zip(held, self._pages, strict=True)
        ):
            raise RuntimeError(
                "DecodeGraph: expected the pages that were reserved, got others: the cache has "
                "grown, was reset, has other sequences or layers of different lengths; make "
                "another DecodeGraph"
            )
        if state.length >= self._limit:
            raise RuntimeError(
                f"DecodeGraph: expected at most {self._limit} columns, which pages were reserved "
                f"for, got a step after {state.length}; make another DecodeGraph"
            )
        if state is not self._state:
            self._place(state)
        self._ids.copy_(token_ids[:, None])
        if self._graph is None:
            logits = self._pass()
        else:
            self._graph.replay()
            logits = self._logits.clone()  # the next step overwrites them
        length = state.length + 1
        valid = None if self._valid is None else self._valid[:, :length]
        self._account(BatchState(length, valid))
        return logits

    @property
    def room(self) -> int:
        """Steps that pages are reserved for still."""
        return self._limit - self._batch.state.length

    def _pass(self) -> torch.Tensor:
        """The step itself: returns logits [B, vocabulary] for `_ids`, and advances `_lens`."""
        if self._step is not None:
            return self._step(self._ids, self._lens)
        metadata = self._metadata()
        logits: torch.Tensor = self._model(
            self._ids,
            position_ids=metadata.positions[:, None],
            forward_pass=ForwardPass(metadata),
            **self._arguments,
        ).logits[:, -1]
        self._lens.copy_(metadata.seq_lens)
        return logits

    def _metadata(self) -> AttentionMetadata:
        """Of a step at the lengths as they are now."""
        return AttentionMetadata(self._lens.long(), None, self._lens + 1, self._cu_seqlens_q)

    def _capture(self, state: BatchState) -> None:
        """Captures `_pass`. The warm-up passes append at the end, where nothing is yet."""
        with torch.cuda.device(self._ids.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    self._place(state)
                    self._pass()
            torch.cuda.current_stream().wait_stream(side)
            self._place(state)  # a warm-up's position may be the last that there is room for
            graph = torch.cuda.CUDAGraph()
            # In the default mode a cudaMalloc of any other thread would end the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._pass()
        self._graph = graph
        # Keeps alive the memory that the graph reads, whatever happens to the model's parameters.
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._weights = [tensor.detach() for tensor in tensors]

    def _place(self, state: BatchState) -> None:
        """Sets the lengths to those of a state of the cache."""
        if state.valid is None:
            self._valid = None
            self._lens.fill_(state.length)
            return
        room = state.valid.new_ones(len(self._lens), max(self._limit - state.length, 0))
        self._valid = torch.cat([state.valid, room], dim=1)
        self._lens.copy_(state.valid.sum(1))

    def _account(self, state: BatchState) -> None:
        """Records in the cache what its pages hold."""
        self._state = self._batch.state = state
        for layer in self._cache.layers:
            layer.paged.length = state.length


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why `DecodeGraph` cannot run a model, or None."""
    attentions = [module for module in model.modules() if isinstance(module, ResQAttention)]
    if not attentions or any(module.kv_bits != 4 for module in attentions):
        return "expected a quantized model with 4-bit keys and values"
    if (parallel := parallel_of(model)) is not None:
        return f"expected all of a model, got a rank of tensor parallel {parallel.degree}"
    if len(devices := {str(tensor.device) for tensor in model.parameters()}) > 1:
        return f"expected all weights on one device, got {', '.join(sorted(devices))}"
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    if (rope := getattr(rotary, "rope_type", "default")) in HOST_ROPE:
        return f"expected a RoPE whose frequencies do not depend on the length, got {rope!r}"
    return None


def _checked_layers(
    model: PreTrainedModel, cache: Cache, max_new_tokens: int
) -> Sequence[ResQCacheLayer]:
    """The layers of the cache, if steps over them can be prepared."""
    if reason := unsupported_reason(model):
        raise ValueError(f"DecodeGraph: model: {reason}")
    layers: Sequence[ResQCacheLayer] = cache.layers
    count = model.config.num_hidden_layers
    kinds = {type(layer).__name__ for layer in layers}
    held = {layer.get_seq_length() for layer in layers}
    if kinds != {ResQCacheLayer.__name__} or len(layers) != count or len(held) != 1 or 0 in held:
        raise ValueError(
            f"DecodeGraph: cache: expected {count} layers of 4-bit pages that hold tokens (a pass "
            f"of the model fills them), got {len(layers)} {' and '.join(sorted(kinds))} after "
            f"{' and '.join(map(str, sorted(held))) or 0} columns"
        )
    if max_new_tokens < 1:
        raise ValueError(f"DecodeGraph: max_new_tokens: expected at least 1, got {max_new_tokens}")
    return layers
