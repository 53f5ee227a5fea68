"""PagedKeysValues: the keys and values of one layer in 4-bit pages."""

from __future__ import annotations

import torch

from resq_kernels import ops
from resq_kernels.formats import join_heads
from resq_kernels.kv_pages import DEFAULT_PAGE_SIZE, token_bytes
from resq_kernels.nn import prefill
from resq_kernels.nn.batch import AttentionMetadata, out_of_step


class PagedKeysValues:
    """The keys and values of one layer in 4-bit pages.

    Sequence b owns pages b P to (b + 1) P - 1. Growing copies the pages and at least doubles P, so
    appending takes amortised linear time. Beam search and similar methods copy whole pages, as a
    float cache copies tensors.

    Attributes:
        pages: uint8 [B * P, n_kv, page_size * token_bytes] (docs/formats.md section 5), or None.
        length: number of stored columns, padding included.

    Source: arXiv 2412.14363, section 4.3 (KV cache).
    """

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        self.page_size = page_size
        self.pages: torch.Tensor | None = None
        self.pages_per_sequence = 0
        self.length = 0

    @property
    def used_pages(self) -> int:
        """Pages of a sequence that hold tokens."""
        return self._pages_of(self.length)

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def append(
        self,
        metadata: AttentionMetadata,
        k: torch.Tensor,
        v: torch.Tensor,
        key_rotation: torch.Tensor | None,
        hi_bits: int,
        q: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Quantizes k and v [B * L, n_kv, D] into the pages and returns q [B * L, n_q, D] after
        RoPE and rotation, float32 (`ops.kv_append`).

        Raises:
            ValueError: the pages hold other columns or sequences than the batch before the pass.
        """
        self.make_room(metadata, k.shape[1], k.shape[2], k.device)
        slots = metadata.slots(self.pages_per_sequence * self.page_size)
        rope = (metadata.cos, metadata.sin)
        rotated = ops.kv_append(k, v, *rope, key_rotation, self.held(), slots, hi_bits, q)
        self.advance(metadata)
        return rotated

    def advance(self, metadata: AttentionMetadata) -> None:
        """Counts the columns of a pass, whose tokens are in the pages."""
        if metadata.after is not None:
            self.length = metadata.after.length

    def attend(
        self,
        metadata: AttentionMetadata,
        q: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
        head_dim_hi: int = 0,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        """Attention of rotated q [B * L, n_q, D]: [B * L, n_q D] in `dtype`, zero for padding.

        Computed by `ops.kv_attention`, or by `prefill.attend` where that is faster. Heads are
        joined as in `formats.join_heads`.
        """
        table, rows = metadata.block_table(self.pages_per_sequence), metadata.rows
        if rows is not None:
            padded, q = q.flatten(1), q[rows]
        if prefill.is_faster(q.device.type, metadata.new, batch_invariant):
            where = (table, metadata.seq_lens, metadata.lengths)
            out = prefill.attend(q, self.held(), *where, scale)
            out = join_heads(out.to(dtype), head_dim_hi)
        else:
            starts = (table, metadata.seq_lens, metadata.cu_seqlens_q)
            out = ops.kv_attention(
                q, self.held(), *starts, scale, out_dtype=dtype, head_dim_hi=head_dim_hi
            )
        return out if rows is None else out.new_zeros(padded.shape).index_copy(0, rows, out)

    def make_room(
        self, metadata: AttentionMetadata, kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        """Makes room for the columns of a pass, at least doubling. A pass that is prepared for any
        length has reserved it.

        Raises:
            ValueError: the pages hold other columns or sequences than the batch before the pass.
        """
        if metadata.after is None:
            return
        if self.length != metadata.start:
            raise ValueError(out_of_step(self.length, metadata.start))
        expected = self.pages_per_sequence * metadata.batch
        if self.pages is not None and self.pages.size(0) != expected:
            if self.length:
                raise ValueError(
                    "PagedKeysValues: expected the sequences that the cache holds, "
                    f"{len(self.pages) // self.pages_per_sequence}, got {metadata.batch}"
                )
            self.reset()
        needed = self._pages_of(metadata.after.length)
        if needed > self.pages_per_sequence:
            chunk = self.page_size * token_bytes(head_dim)
            per_sequence = max(needed, 2 * self.pages_per_sequence)
            self._grow((metadata.batch, per_sequence, kv_heads, chunk), device)

    def reserve(self, length: int) -> None:
        """Makes room for `length` columns and no more; the batch must have tokens."""
        needed = self._pages_of(length)
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
        """Frees all pages."""
        self.pages, self.pages_per_sequence, self.length = None, 0, 0

    def memory_bytes(self, reserved: bool = False) -> int:
        """Bytes of the pages that hold tokens; with `reserved`, of those kept for growth too."""
        if self.pages is None:
            return 0
        pages = self.pages_per_sequence if reserved else self.used_pages
        return pages * self._by_sequence()[:, 0].numel()
