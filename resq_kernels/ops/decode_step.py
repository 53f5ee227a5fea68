"""decode_step: all decoder layers for one token of every sequence, by a step prepared once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_kernels import _library


def prepare_decode_step(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    eps: float,
    scale: float,
    n_hi: Sequence[int],
    clip: Sequence[float],
    lo_bits: int = 4,
    symmetric: bool = False,
    hi_bits: int = 8,
    hadamard: bool = True,
    hadamard_block: int = 0,
) -> torch.Tensor:
    """Checks the arguments of `decoder_layers` once for all tokens that are decoded with them.

    Args:
        x: f [B, hidden], of whose shape and dtype those of the steps are; its values do not count.
        cos, sin: float32 [P, D], tables of RoPE: row p for position p.
        caches, block_table: as in `decoder_layers`; the pages of the B sequences.
        weights, eps, scale, n_hi, clip, lo_bits, symmetric, hi_bits, hadamard, hadamard_block: as
            in `decoder_layers`.

    Returns:
        The step, for `decode_step`: uint8 [1] that holds the tensors given here, and the memory
        that the layers compute in, until it is deleted. A copy of it is no step.

    Raises:
        RuntimeError: as `decoder_layers`; no CPU; other shapes or dtypes than above.
    """
    step: torch.Tensor = _library.call(
        torch.ops.resq.prepare_decode_step.default,
        x,
        cos,
        sin,
        caches,
        block_table,
        weights,
        eps,
        scale,
        n_hi,
        clip,
        lo_bits,
        symmetric,
        hi_bits,
        hadamard,
        hadamard_block,
    )
    return step


def decode_step(step: torch.Tensor, x: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """One token of every sequence through all decoder layers.

    Formula: with cos, sin and slot of position seq_lens[b], out + residual of `decoder_layers` at
    lengths seq_lens + 1, rounded to x's dtype: the same bits. Then seq_lens += 1. What is gained is
    what torch does for a call of `decoder_layers` (docs/notes/0066).

    On CPUs only: on CUDA a captured graph repeats the launches of a step without any of that. A
    step computes one call at a time; another thread's waits.

    Args:
        step: of `prepare_decode_step`.
        x: [B, hidden] as the step was prepared for.
        seq_lens: int32 [B], tokens of each sequence that its pages hold; written.

    Returns:
        The hidden states after the last layer, like x.

    Raises:
        RuntimeError: `step` is none, x or seq_lens have another shape or dtype, a length has no row
            of the tables or no page: nothing is written.
    """
    out: torch.Tensor = _library.call(torch.ops.resq.decode_step.default, step, x, seq_lens)
    return out


@_library.register_fake("prepare_decode_step")
def _fake_prepare(x: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
    return x.new_empty(1, dtype=torch.uint8)


@_library.register_fake("decode_step")
def _fake(step: torch.Tensor, x: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
