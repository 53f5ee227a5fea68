"""Sequences in 4-bit pages: who has how many tokens, and where the next ones go.

`Sequences` is the state of a batch, the same for all layers; `PagedKeysValues` is the storage of
one layer. Neither knows transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from resq_kernels import ops
from resq_kernels.formats import join_heads
from resq_kernels.kv_pages import DEFAULT_PAGE_SIZE, token_bytes
from resq_kernels.nn import prefill


@dataclass
class Step:
    """Where the tokens of one forward pass go.

    Attributes:
        positions: int64 [B * L], a token's place in its own sequence; -1 for padding.
        rows: int64 [tokens], which of the B * L rows are tokens; None if all are.
        seq_lens: int32 [B], tokens of every sequence, the new ones included.
        query_starts: int32 [B + 1], where the new tokens of every sequence start among `rows`.
        padded_length: columns of the batch so far, padding included: the most pages need to hold.
    """

    positions: torch.Tensor
    rows: torch.Tensor | None
    seq_lens: torch.Tensor
    query_starts: torch.Tensor
    padded_length: int
    _made: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.seq_lens.shape[0]

    @property
    def columns(self) -> int:
        """L, padding included."""
        return len(self.positions) // max(self.batch, 1)

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """(new tokens, all tokens) of every sequence; read from the device if there is padding."""
        if self.rows is None:
            return [(self.columns, self.padded_length)] * self.batch
        new = self.query_starts.diff().tolist()
        return list(zip(new, self.seq_lens.tolist(), strict=True))

    def slots(self, capacity: int) -> torch.Tensor:
        """int64 [B * L] cache slots if every sequence owns `capacity` of them; -1 for padding."""
        return self._once("slots", capacity, self._slots)

    def _slots(self, capacity: int) -> torch.Tensor:
        first = torch.arange(self.batch, device=self.positions.device) * capacity
        slots = self.positions.view(self.batch, -1) + first[:, None]
        return slots.flatten().where(self.positions >= 0, -1)

    def table(self, pages: int) -> torch.Tensor:
        """int32 [B, pages]: the block table if every sequence owns that many pages in a row."""
        return self._once("table", pages, self._table)

    def _table(self, pages: int) -> torch.Tensor:
        device = self.positions.device
        return torch.arange(self.batch * pages, dtype=torch.int32, device=device).view(-1, pages)

    def _once(self, name: str, size: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """What the layers of a pass share: eight launches a pass and not a layer."""
        if (name, size) not in self._made:
            self._made[name, size] = make(size)
        return self._made[name, size]


Change = TypeVar("Change")  # what a change of a state returns


@dataclass(eq=False)
class Sequences:
    """What a batch has seen. Immutable: every change returns a new state.

    All layers of a cache hold the same object and go through the same changes; a state remembers
    its last change, so that the bookkeeping of a pass is done once and not once a layer.

    Attributes:
        length: columns seen, padding included (what transformers calls the cache's length).
        valid: bool [B, length], which of them are tokens; None if all are.
    """

    length: int = 0
    valid: torch.Tensor | None = None
    _last: tuple[tuple[Any, ...], Any] | None = field(default=None, repr=False)

    def _once(self, change: tuple[Any, ...], make: Callable[[], Change]) -> Change:
        if self._last is None or not all(map(_same, self._last[0], change)):
            self._last = (change, make())
        after: Change = self._last[1]
        return after

    def append(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> tuple[Sequences, Step]:
        """The state after `new` more columns, and where their tokens go.

        Args:
            batch, new: B and L.
            mask: [B, columns], nonzero where a token is; its last L columns are the new ones. None:
                all new columns are tokens.
            device: where the tensors of the step are made.

        Raises:
            ValueError: the mask has another batch or fewer columns than L, or treats a token that
                is in the cache differently than the pass that put it there.
        """
        return self._once(
            ("append", batch, new, mask, device), lambda: self._append(batch, new, mask, device)
        )

    def _append(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> tuple[Sequences, Step]:
        length = self.length + new
        if mask is None and self.valid is None:
            positions = torch.arange(self.length, length, device=device).repeat(batch)
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
            lens = torch.full((batch,), length, dtype=torch.int32, device=device)
            return Sequences(length), Step(positions, None, lens, starts, length)
        fresh = self._fresh(batch, new, mask, device)
        past = self.valid
        if past is None:
            past = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        before = past.sum(1, keepdim=True)
        positions = torch.where(fresh, before + fresh.cumsum(1) - 1, -1).flatten()
        counts = fresh.sum(1)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        lens = (before[:, 0] + counts).int()
        rows = fresh.flatten().nonzero()[:, 0]
        after = Sequences(length, torch.cat([past, fresh], dim=1))
        return after, Step(positions, rows, lens, starts, length)

    def _fresh(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """bool [B, L]: which of the new columns are tokens."""
        if mask is None:
            return torch.ones(batch, new, dtype=torch.bool, device=device)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < new:
            raise ValueError(
                f"ResQAttention: attention_mask: expected [{batch}, {self.length + new}] with the "
                f"padding of every column, got {list(mask.shape)}"
            )
        mask = mask.to(device=device, dtype=torch.bool)
        seen = mask[:, :-new]
        if self.length and seen.shape[1] == self.length:
            past = torch.ones_like(seen) if self.valid is None else self.valid
            if not torch.equal(seen, past):
                raise ValueError(
                    "ResQAttention: attention_mask: expected the mask that cached tokens were "
                    "stored with: a token cannot be hidden or shown later"
                )
        return mask[:, -new:]

    def crop(self, columns: int) -> Sequences:
        """The state without the last `columns` columns."""
        keep = max(self.length - columns, 0)
        valid = None if self.valid is None else self.valid[:, :keep]
        return self._once(("crop", columns), lambda: Sequences(keep, valid))

    def select(self, indices: torch.Tensor) -> Sequences:
        """The state of the sequences `indices` int64 [B']."""
        if self.valid is None:
            return self
        valid = self.valid
        return self._once(
            ("select", indices), lambda: Sequences(self.length, valid[indices.to(valid.device)])
        )

    def repeat_interleave(self, repeats: int) -> Sequences:
        """The state with every sequence `repeats` times in a row."""
        if self.valid is None:
            return self
        valid = self.valid
        return self._once(
            ("repeat", repeats),
            lambda: Sequences(self.length, valid.repeat_interleave(repeats, dim=0)),
        )

    def restart(self) -> Sequences:
        """The empty state; the same object for all layers that ask."""
        return self._once(("restart",), Sequences)


class PagedKeysValues:
    """The keys and values of one layer in 4-bit pages; sequence b owns pages b P to (b + 1) P - 1.

    Growing copies, at least doubling P, so appending is amortised linear; beam search and its
    relatives copy whole pages, as a float cache copies tensors.

    Attributes:
        pages: uint8 [B * P, n_kv, page_size * token_bytes] (docs/formats.md section 5), or None.

    Source: arXiv 2412.14363, section 4.3 (KV cache).
    """

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        self.page_size = page_size
        self.pages: torch.Tensor | None = None
        self.pages_per_sequence = 0
        self.used_pages = 0

    def append(
        self,
        step: Step,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_rotation: torch.Tensor | None,
        hi_bits: int,
        q: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Quantizes k and v [B * L, n_kv, D] into the pages and returns q [B * L, n_q, D] after
        RoPE and rotation, float32 (`ops.kv_append`)."""
        self._reserve(step, k)
        slots = step.slots(self.pages_per_sequence * self.page_size)
        return ops.kv_append(k, v, cos, sin, key_rotation, self.held(), slots, hi_bits, q)

    def attend(
        self,
        step: Step,
        q: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
        high_dims: int = 0,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        """[B * L, n_q D] in `dtype` of rotated q [B * L, n_q, D]; zero for padding.

        Heads are joined as `formats.join_heads` does.
        `ops.kv_attention`, or `prefill.attend` where that is faster.
        """
        table, rows = step.table(self.pages_per_sequence), step.rows
        if rows is not None:
            padded, q = q.flatten(1), q[rows]
        if prefill.is_faster(q.device.type, step.columns, batch_invariant):
            out = prefill.attend(q, self.held(), table, step.seq_lens, step.lengths, scale)
            out = join_heads(out.to(dtype), high_dims)
        else:
            where = (table, step.seq_lens, step.query_starts)
            out = ops.kv_attention(
                q, self.held(), *where, scale, out_dtype=dtype, high_dims=high_dims
            )
        return out if rows is None else out.new_zeros(padded.shape).index_copy(0, rows, out)

    def _reserve(self, step: Step, k: torch.Tensor) -> None:
        needed = -(-step.padded_length // self.page_size)
        if needed > self.pages_per_sequence:
            chunk = self.page_size * token_bytes(k.shape[-1])
            per_sequence = max(needed, 2 * self.pages_per_sequence)
            self._grow((step.batch, per_sequence, k.shape[1], chunk), k.device)
        self.used_pages = max(self.used_pages, needed)

    def reserve(self, padded_length: int) -> None:
        """Makes room for `padded_length` columns and no more, of a batch that has tokens."""
        needed = -(-padded_length // self.page_size)
        if needed > self.pages_per_sequence:
            batch, _, heads, chunk = self._by_sequence().shape
            self._grow((batch, needed, heads, chunk), self.held().device)

    def _grow(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        """Moves the pages that hold tokens into new ones, [B, P, n_kv, bytes]."""
        grown = torch.empty(shape, dtype=torch.uint8, device=device)
        if self.used_pages:
            grown[:, : self.used_pages] = self._by_sequence()[:, : self.used_pages]
        self.pages, self.pages_per_sequence = grown.flatten(0, 1), shape[1]

    def _by_sequence(self) -> torch.Tensor:
        """The pages as [B, P, n_kv, bytes]."""
        pages = self.held()
        return pages.view(-1, self.pages_per_sequence, *pages.shape[1:])

    def held(self) -> torch.Tensor:
        """The pages.

        Raises:
            RuntimeError: there are none yet; the first `append` makes them.
        """
        if self.pages is None:
            raise RuntimeError("PagedKeysValues: expected pages, got none before the first append")
        return self.pages

    def crop(self, padded_length: int) -> None:
        """Gives the pages beyond `padded_length` columns up for reuse."""
        self.used_pages = -(-padded_length // self.page_size)

    def select(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices` int64 [B'], in that order."""
        if self.pages is not None:
            chosen = self._by_sequence().index_select(0, indices.to(self.pages.device))
            self.pages = chosen.flatten(0, 1)

    def repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times in a row."""
        if self.pages is not None:
            self.pages = self._by_sequence().repeat_interleave(repeats, dim=0).flatten(0, 1)

    def reset(self) -> None:
        """Gives all pages back."""
        self.pages, self.pages_per_sequence, self.used_pages = None, 0, 0

    def memory_bytes(self, reserved: bool = False) -> int:
        """Bytes of the pages that hold tokens; with `reserved`, of those kept for growth too."""
        if self.pages is None:
            return 0
        pages = self.pages_per_sequence if reserved else self.used_pages
        return pages * self._by_sequence()[:, 0].numel()


def _same(a: Any, b: Any) -> bool:
    """Equal as argument of a change; tensors by identity."""
    return a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)
