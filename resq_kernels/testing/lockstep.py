"""Compares kernels and reference path without the divergence that rounding causes.

In a 4-bit model, two paths that differ only by float rounding drift apart. A value on the edge of
two codes is rounded up in one path and down in the other; everything after it sees a different
number. After some tens of tokens the paths are as far apart as two draws of the quantization noise.
A perplexity over 16k tokens then differs by 0.2 % whichever path is right, which hides smaller
errors. Therefore the reference path follows the kernels: it takes over a row of their codes if
these represent the reference's values as well as its own codes do, up to `edge_share` of the range.
Otherwise it keeps its own codes. The remaining difference is the error of the kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resq_kernels import hadamard as _hadamard
from resq_kernels import kv_pages, ops, reference
from resq_kernels.fake_quant import fake_quantized
from resq_kernels.formats import MixedTensor, RowFormat, unpack_int4
from resq_kernels.reference.kv_pages import read_tokens

_QUANTIZERS = ("mixed_quantize", "rms_norm_quantize", "silu_mul_hadamard_quantize")


def edge_share(dtype: torch.dtype) -> float:
    """How much worse the kernels' codes may be than the reference's, as a share of the range.

    Formula: half of max(eps(dtype), 2^-8): 1/256 for bfloat16, one rounding of a value (0.06 of a
    4-bit step), and 1/512 otherwise, as kv_attention computes in float16 inside and may average
    values to something smaller. Codes that differed in 72 windows of the demo's models needed at
    most 1/1122; an error of 1/256 at one value is refused.
    """
    return max(torch.finfo(dtype).eps, 2.0**-8) / 2


@dataclasses.dataclass
class Agreement:
    """How far the kernels' codes agreed with the reference path.

    Attributes:
        rows: quantized rows (a token at one place, a head of a key or value).
        refused: rows that did not represent the reference's values.
        flipped: values whose code differs from the reference's own, on an edge of two codes.
        values: all quantized values.
    """

    rows: int = 0
    refused: int = 0
    flipped: int = 0
    values: int = 0


@contextlib.contextmanager
def lockstep(model: nn.Module, run: Callable[[], Any]) -> Iterator[tuple[Any, Agreement]]:
    """Runs the kernels; inside the block the model is the reference path that follows their codes.

    Args:
        model: a quantized model, on any device for `run`.
        run: one pass of the model, without a cache; the block must do the same pass once, with the
            model on the CPU.

    Yields:
        What `run` returned, and the counts, which are complete when the block ends.

    Raises:
        RuntimeError: the block quantized more or fewer tensors than `run`.
    """
    with _recorded() as codes:
        result = run()
    follower = _Follower(codes, edge_share(next(model.parameters()).dtype))
    with fake_quantized(model, follower):
        yield result, follower.agreement
    if follower.codes:
        raise RuntimeError(
            f"lockstep: expected the same pass in the block, {len(follower.codes)} tensors of the "
            "kernels were not reached"
        )


@contextlib.contextmanager
def _recorded() -> Iterator[deque[MixedTensor | torch.Tensor]]:
    """What every quantizing operator returns inside the block, in order, on the CPU.

    The functions that the modules call are replaced: a dispatch mode would see more, but torch's
    CausalBias (nn.prefill) cannot be made under one.
    """
    codes: deque[MixedTensor | torch.Tensor] = deque()
    right = {name: getattr(ops, name) for name in (*_QUANTIZERS, "kv_append")}

    def quantize(name: str, *args: Any, **kwargs: Any) -> Any:
        result = right[name](*args, **kwargs)
        mixed = result if isinstance(result, MixedTensor) else result[0]
        q_lo, q_hi, params = (part.cpu() for part in mixed)
        q_lo = unpack_int4(q_lo) if q_lo.dtype == torch.uint8 else q_lo
        codes.append(MixedTensor(q_lo, q_hi, params))
        return result

    def append(*args: Any, **kwargs: Any) -> Any:
        result = right["kv_append"](*args, **kwargs)
        k, cache, slots = args[0], args[5].cpu(), args[6].cpu()
        rows = read_tokens(cache, slots, k.shape[-1])
        codes.extend(part.dequantize() for part in rows)
        return result

    for name in _QUANTIZERS:
        setattr(ops, name, functools.partial(quantize, name))
    ops.kv_append = append
    # A hook of all modules, for which no call computes all layers (nn/decoder_layers.py).
    single = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        yield codes
    finally:
        single.remove()
        for name, function in right.items():
            setattr(ops, name, function)


class _Follower:
    """The reference's rounding functions, which take over the kernels' codes where they fit."""

    def __init__(self, codes: deque[MixedTensor | torch.Tensor], share: float) -> None:
        self.codes, self.share, self.agreement = codes, share, Agreement()

    def mixed_quantize(self, x: torch.Tensor, *options: Any) -> MixedTensor:
        x, rows = x.float(), RowFormat(*options)
        own, theirs = reference.mixed_quantize(x, *rows), self._next()
        sizes = torch.tensor([x.shape[-1] - rows.k_hi, rows.k_hi])
        steps = torch.repeat_interleave(own.params[..., 0::2], sizes, dim=-1)
        levels = torch.tensor([(2.0**rows.lo_bits - 1) / rows.clip, 255.0])
        edge = self.share * steps * torch.repeat_interleave(levels, sizes)
        if rows.clip < 1:
            # Where a zero point is on an edge, the codes reach one step further up or down.
            low, high = x[..., : sizes[0]].aminmax(dim=-1, keepdim=True)
            inside = (x > rows.clip * low + steps) & (x < rows.clip * high - steps)
            inside[..., sizes[0] :] = True
            edge += torch.where(inside, 0.0, steps)
        taken = self._fits(x, own.dequantize(), theirs.dequantize(), edge)
        return MixedTensor(*(torch.where(taken, b, a) for a, b in zip(own, theirs, strict=True)))

    def rms_norm_quantize(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        *options: Any,
    ) -> tuple[MixedTensor, torch.Tensor]:
        new_residual = x if residual is None else x + residual
        normed = reference.rms_norm(new_residual.float(), weight, eps)
        return self.mixed_quantize(normed, *options), new_residual

    def silu_mul_hadamard_quantize(
        self, gate_up: torch.Tensor, hadamard: bool, n_hi: int, *options: Any
    ) -> MixedTensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        product = F.silu(gate) * up
        if hadamard:
            product = _hadamard.transform_low(product, n_hi, options[-1])
        return self.mixed_quantize(product, n_hi, *options[:-1])

    def kv_fake_quantize(self, x: torch.Tensor, hi_bits: int = 8) -> torch.Tensor:
        own, theirs = reference.kv_fake_quantize(x, hi_bits), self._next().view_as(x)
        low = kv_pages.low_dims(x.shape[-1]) if hi_bits == 8 else x.shape[-1]
        parts = [part for part in (x[..., :low], x[..., low:]) if part.shape[-1]]
        ranges = [(part.amax(-1) - part.amin(-1))[..., None].expand_as(part) for part in parts]
        taken = self._fits(x, own, theirs, self.share * torch.cat(ranges, dim=-1))
        return torch.where(taken, theirs, own)

    def _next(self) -> Any:
        if not self.codes:
            raise RuntimeError("lockstep: the block quantizes more tensors than the kernels did")
        return self.codes.popleft()

    def _fits(
        self, x: torch.Tensor, own: torch.Tensor, theirs: torch.Tensor, edge: torch.Tensor
    ) -> torch.Tensor:
        """bool [..., 1]: which of the kernels' rows represent x as well as the reference's own."""
        fits = ((x - theirs).abs() <= (x - own).abs() + edge).all(-1, keepdim=True)
        self.agreement.rows += fits.numel()
        self.agreement.refused += int((~fits).sum())
        self.agreement.values += x.numel()
        # A code that differs moves the value by a whole step, at least 1 / 255 of the range.
        self.agreement.flipped += int((fits & ((own - theirs).abs() > edge / 2)).sum())
        return fits
