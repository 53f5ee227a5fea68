"""State that the layers of a batch share: between passes, and within one pass.

`Batch` holds the state of a cache, one for all of its layers. `ForwardPass` makes the
`AttentionMetadata` of a pass, once for all layers. Nothing here knows transformers or pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from resq_kernels.nn.decoder_layers import DecoderLayers


@dataclass(frozen=True, eq=False)
class BatchState:
    """The columns that a batch has seen. Immutable: every change returns a new state.

    Attributes:
        length: columns seen, padding included (what transformers calls the cache's length).
        valid: bool [B, length], which of them are tokens; None if all are.
    """

    length: int = 0
    valid: torch.Tensor | None = None

    def append(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> AttentionMetadata:
        """Returns where the tokens of `new` more columns go, and the state after them.

        Args:
            batch, new: B and L.
            mask: [B, columns], nonzero where a token is; its last L columns are the new ones. None:
                all new columns are tokens.
            device: where the tensors of the metadata are made.

        Raises:
            ValueError: the mask has another batch size or fewer than L columns, or disagrees
                about a cached token with the mask of the pass that stored it.
            RuntimeError: the call is traced.
        """
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "ResQAttention: expected a call, got torch.jit.trace, which would make constants "
                "of lengths and padding; use torch.export or torch.compile"
            )
        length = self.length + new
        if self.valid is not None and len(self.valid) != batch:
            raise ValueError(
                f"ResQAttention: cache: expected the {len(self.valid)} sequences that it holds, "
                f"got {batch}"
            )
        if self.valid is None and (mask is None or _is_full(mask, batch, new)):
            positions = torch.arange(self.length, length, device=device).repeat(batch)
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
            lens = torch.full((batch,), length, dtype=torch.int32, device=device)
            after = BatchState(length)
            return AttentionMetadata(positions, None, lens, starts, self.length, after)
        past = self.tokens(batch, device)
        fresh = self._fresh(batch, new, mask, past)
        before = past.sum(1, keepdim=True)
        positions = torch.where(fresh, before + fresh.cumsum(1) - 1, -1).flatten()
        counts = fresh.sum(1)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        lens = (before[:, 0] + counts).int()
        found = fresh.flatten().nonzero()[:, 0]
        # A compiled graph cannot look whether any of the new columns is padding.
        full = not torch.compiler.is_compiling() and len(found) == fresh.numel()
        rows = None if full else found
        after = BatchState(length, torch.cat([past, fresh], dim=1))
        return AttentionMetadata(positions, rows, lens, starts, self.length, after)

    def tokens(self, batch: int, device: torch.device) -> torch.Tensor:
        """`valid` as bool [B, length]; all true if it is None."""
        if self.valid is None:
            return torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return self.valid.to(device)

    def _fresh(
        self, batch: int, new: int, mask: torch.Tensor | None, past: torch.Tensor
    ) -> torch.Tensor:
        """bool [B, L]: which of the new columns are tokens."""
        if mask is None:
            return torch.ones(batch, new, dtype=torch.bool, device=past.device)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < new:
            raise ValueError(
                f"ResQAttention: attention_mask: expected [{batch}, {self.length + new}] with the "
                f"padding of every column, got {list(mask.shape)}"
            )
        mask = mask.to(device=past.device, dtype=torch.bool)
        seen = mask[:, :-new]
        if self.length and seen.shape[1] == self.length and not torch.equal(seen, past):
            raise ValueError(
                "ResQAttention: attention_mask: expected the mask that cached tokens were "
                "stored with: a token cannot be hidden or shown later"
            )
        return mask[:, -new:]

    def first(self, columns: int) -> BatchState:
        """The state after only the first `columns` columns."""
        if columns >= self.length:
            return self
        if columns <= 0:
            return BatchState()
        return BatchState(columns, None if self.valid is None else self.valid[:, :columns])

    def select(self, indices: torch.Tensor) -> BatchState:
        """The state of the sequences `indices` int64 [B']."""
        if self.valid is None:
            return self
        return replace(self, valid=self.valid[indices.to(self.valid.device)])

    def repeat_interleave(self, repeats: int) -> BatchState:
        """The state with every sequence `repeats` times in a row."""
        if self.valid is None:
            return self
        return replace(self, valid=self.valid.repeat_interleave(repeats, dim=0))


def _is_full(mask: torch.Tensor, batch: int, new: int) -> bool:
    """Whether a mask shows every column. A compiled graph cannot read its values."""
    if torch.compiler.is_compiling() or mask.dim() != 2 or len(mask) != batch:
        return False
    return mask.shape[1] >= new and bool(mask.all())


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Where the tokens of one forward pass go, the same for all layers on a device.

    Attributes:
        positions: int64 [B * L], a token's place in its own sequence; -1 for padding.
        rows: int64 [tokens], which of the B * L rows are tokens; None if all are.
        seq_lens: int32 [B], tokens of every sequence, the new ones included.
        cu_seqlens_q: int32 [B + 1], where the new tokens of every sequence start among `rows`.
        start: columns of the batch before the pass, padding included.
        after: the state of the batch after the pass. None for a step that is prepared for any
            length: only the device knows where it starts, and pages must be reserved beforehand.
        cos, sin: [B * L, D] contiguous, RoPE of every row; None until `with_rope`.
    """

    positions: torch.Tensor
    rows: torch.Tensor | None
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    start: int = 0
    after: BatchState | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    _slots: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _tables: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.seq_lens.shape[0]

    @property
    def new(self) -> int:
        """L, the columns of the pass, padding included."""
        return len(self.positions) // max(self.batch, 1)

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """(new tokens, all tokens) of every sequence; read from the device if there is padding."""
        if self.after is not None and self.after.valid is None:
            return [(self.new, self.after.length)] * self.batch
        new = self.cu_seqlens_q.diff().tolist()
        return list(zip(new, self.seq_lens.tolist(), strict=True))

    def slots(self, capacity: int) -> torch.Tensor:
        """int64 [B * L] cache slots if every sequence owns `capacity` of them; -1 for padding."""
        if capacity not in self._slots:
            first = torch.arange(self.batch, device=self.positions.device) * capacity
            slots = self.positions.view(self.batch, -1) + first[:, None]
            self._slots[capacity] = slots.flatten().where(self.positions >= 0, -1)
        return self._slots[capacity]

    def block_table(self, pages: int) -> torch.Tensor:
        """int32 [B, pages]: the block table if every sequence owns that many pages in a row."""
        if pages not in self._tables:
            device = self.positions.device
            table = torch.arange(self.batch * pages, dtype=torch.int32, device=device)
            self._tables[pages] = table.view(-1, pages)
        return self._tables[pages]

    def with_rope(self, cos: torch.Tensor, sin: torch.Tensor) -> AttentionMetadata:
        """A copy with cos and sin [B or 1, L, D] or [L, D], on their device.

        Raises:
            ValueError: they are those of other sequences or columns.
        """
        given = list(cos.shape[:-1])
        if given not in ([self.new], [1, self.new], [self.batch, self.new]):
            raise ValueError(
                f"ResQAttention: position_ids: expected [1 or {self.batch}, {self.new}], a "
                f"position for every new column, got {given}"
            )
        shape = (self.batch, self.new, -1)
        cos, sin = (x.expand(shape).flatten(0, 1).contiguous() for x in (cos, sin))
        return replace(
            self,
            positions=self.positions.to(cos.device),
            rows=None if self.rows is None else self.rows.to(cos.device),
            seq_lens=self.seq_lens.to(cos.device),
            cu_seqlens_q=self.cu_seqlens_q.to(cos.device),
            cos=cos,
            sin=sin,
        )


class Batch:
    """The batch of a cache: one state for all of its layers.

    transformers changes a cache layer by layer (crop, beam search). The first layer to make a
    change updates the state. For the other layers it is already done: each layer counts its
    changes.

    Attributes:
        state: the columns that the batch has seen.
        changes: number of changes since the last reset; passes do not count.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.changes = BatchState(), 0

    def change(self, seen: int, change: Callable[[BatchState], BatchState]) -> int:
        """Changes the state for a layer that has made `seen` changes, unless another layer already
        did; returns seen + 1."""
        if seen == self.changes:
            self.state, self.changes = change(self.state), self.changes + 1
        return seen + 1

    def append(
        self, held: int, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> AttentionMetadata:
        """`BatchState.append` for a layer that holds `held` columns; `advance` changes the state.

        A layer that is called on its own may hold fewer columns than the others and catches up.

        Raises:
            ValueError: the layer holds more columns than the batch has seen, or gets other padding
                than the layers before it; or as in `BatchState.append`.
        """
        if held > self.state.length:
            raise ValueError(out_of_step(held, self.state.length))
        metadata = self.state.first(held).append(batch, new, mask, device)
        assert metadata.after is not None
        common = min(metadata.after.length, self.state.length)
        if common > held:  # the others have seen these columns
            states = [state.first(common) for state in (metadata.after, self.state)]
            padded = any(state.valid is not None for state in states)
            if padded and not torch.equal(*(state.tokens(batch, device) for state in states)):
                raise ValueError(
                    "ResQAttention: attention_mask: expected the padding that the other layers of "
                    "the cache got for these columns, got another"
                )
        return metadata

    def advance(self, metadata: AttentionMetadata) -> None:
        """Sets the state after a pass; the first layer that has stored its tokens does so."""
        if metadata.after is not None and metadata.after.length > self.state.length:
            self.state = metadata.after


class ForwardPass:
    """The metadata of one forward pass, made by its first layer, once per device.

    A decoder gives the same object to all of its layers (nn/convert.py) and a new one to each pass.

    Args:
        prepared: metadata that was made before the pass; the state of the cache is then not used.

    Attributes:
        layers: what computes all layers by one call, or None.
    """

    # No method `to`: accelerate would call it between devices.
    def __init__(self, prepared: AttentionMetadata | None = None) -> None:
        self.layers: DecoderLayers | None = None
        self._prepared = prepared
        self._made: dict[tuple[torch.device, bool], AttentionMetadata] = {}

    def metadata(
        self,
        batch: Batch,
        held: int,
        shape: tuple[int, int],
        mask: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        turned: bool = True,
    ) -> AttentionMetadata:
        """The metadata on the device of cos and sin.

        Args:
            batch, held, mask: as in `Batch.append`, which lists the errors.
            shape: (B, L).
            cos, sin: [B or 1, L, D].
            turned: as in `rope_of`.
        """
        key = (cos.device, turned)
        if key not in self._made:
            if self._prepared is None:
                self._prepared = batch.append(held, *shape, mask, cos.device)
            self._made[key] = self._prepared.with_rope(*rope_of(cos, sin, turned))
        return self._made[key]


def rope_of(
    cos: torch.Tensor, sin: torch.Tensor, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of a layer, of those of the model: 1 and 0 if RoPE does not turn it."""
    return (cos, sin) if turned else (torch.ones_like(cos), torch.zeros_like(sin))


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: x cos + rotate_half(x) sin of x [B, L, n, D] with cos, sin [B or 1, L, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


def out_of_step(held: int, expected: int) -> str:
    """The error text for a layer that missed a pass or a change of its cache."""
    return (
        f"ResQAttention: cache: expected a layer with the {expected} columns that the batch has "
        f"seen, got one with {held}: every layer must see every pass and change; reset the cache"
    )
