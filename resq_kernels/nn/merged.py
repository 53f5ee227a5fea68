"""MergedLinears: one product for the linears that read the same rows (q, k, v; gate, up)."""

from __future__ import annotations

from typing import Any

import torch

from resq_kernels.formats import MixedTensor
from resq_kernels.nn.linear import ResQLinear

# A packed weight is a row of blocks, of 32 rows on CPUs and of 64 on CUDA (docs/formats.md section
# 3): weights of whole blocks, one after the other, are the packed weight of all their rows.
_BLOCK_ROWS = 64


class MergedLinears:
    """[y_1 | y_2 | ...] of linears that read the same rows, by one `mixed_gemm`.

    Merging moves packed weights, scales, sums and biases into one tensor each, of which those of
    the linears become slices: no memory is added, and every linear goes on as before, with its own
    parameters, state and result. A linear that was moved, loaded or repacked is merged again at
    the next call. Linears that differ, or that a caller has replaced or hooked, are called one
    after the other; the bits are the same.
    """

    def __init__(self) -> None:
        # Of the linears that were merged: their states, and the addresses of the slices they got;
        # the tensors that these are slices of.
        self._merged: tuple[list[tuple[Any, ...]], list[int], list[Any]] | None = None

    def __call__(self, x: torch.Tensor | MixedTensor, *linears: ResQLinear) -> torch.Tensor:
        """[..., N_1 + N_2 + ...] of x [..., K]; each part is what `linears` return.

        Raises:
            RuntimeError: a linear is not packed, or x has another K.
        """
        if not self._holds(linears):
            if not self._may_merge_now(linears):
                return torch.cat([linear(x) for linear in linears], dim=-1)
            self.merge(*linears)
        assert self._merged is not None  # linears that are alike were merged
        return linears[0].multiply(x, *self._merged[2])

    def merge(self, *linears: ResQLinear) -> None:
        """Moves the tensors of the linears together, if they can be."""
        if not _alike(linears):
            return
        # Made for later calls too, which may be outside of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            whole, slices = [], []
            for same in zip(*(linear.weight_tensors() for linear in linears), strict=True):
                joined = None if same[0] is None else torch.cat([t.detach() for t in same])
                whole.append(joined)
                slices.append(same if joined is None else joined.split([len(t) for t in same]))
            for linear, own in zip(linears, zip(*slices, strict=True), strict=True):
                linear.adopt(*own)
        self._merged = (_states(linears), _addresses(linears), whole)

    def _holds(self, linears: tuple[ResQLinear, ...]) -> bool:
        """Whether the linears are the ones that were merged, with the tensors they got then."""
        if self._merged is None or not all(map(_is_plain, linears)):
            return False
        states, addresses, _ = self._merged
        if states != _states(linears):
            return False
        # Addresses cannot be traced; a parameter whose `.data` was set is seen in eager mode only.
        return torch.compiler.is_compiling() or addresses == _addresses(linears)

    @staticmethod
    def _may_merge_now(linears: tuple[ResQLinear, ...]) -> bool:
        """Not while a graph is traced or captured: the tensors would belong to it."""
        if torch.compiler.is_compiling() or not _alike(linears):
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _states(linears: tuple[ResQLinear, ...]) -> list[tuple[Any, ...]]:
    return [(linear.version, *_reading(linear)) for linear in linears]


def _addresses(linears: tuple[ResQLinear, ...]) -> list[int]:
    return [
        tensor.data_ptr()
        for linear in linears
        for tensor in linear.weight_tensors()
        if tensor is not None
    ]


def _is_plain(linear: Any) -> bool:
    """A packed ResQLinear whose `forward` nobody replaced or listens to."""
    return (
        type(linear) is ResQLinear
        and linear.is_packed
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and "forward" not in vars(linear)
    )


def _alike(linears: tuple[ResQLinear, ...]) -> bool:
    """Whether one product can stand for all of them."""
    if not all(map(_is_plain, linears)):
        return False
    if any(linear.out_features % _BLOCK_ROWS for linear in linears[:-1]):
        return False
    first = linears[0]
    return all(
        _reading(linear) == _reading(first)
        and linear.weight_tensors()[0].device == first.weight_tensors()[0].device
        for linear in linears
    )


def _reading(linear: ResQLinear) -> tuple[Any, ...]:
    """What has to be the same: how rows are read and the dtype of the result."""
    options = (linear.lo_bits, linear.symmetric, linear.clip, linear.dtype)
    return (linear.in_features, linear.high_columns, linear.bias is not None, *options)
