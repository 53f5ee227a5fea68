"""The quantizing operators compared with the torch operations that a user would write.

mixed_quantize, rms_norm_quantize with a residual, and silu_mul_hadamard_quantize at the widths of a
model. Codes are compared with the reference before anything is timed. The bound of a row is the
bytes of its inputs and outputs / the measured bandwidth of a copy.

    resq bench quantize --shapes llama-3-8b --batch 1,16,512
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from resq_kernels import formats, ops, reference
from resq_kernels.architecture import DOWN_PROJ
from resq_kernels.bench import models
from resq_kernels.bench.device import BenchDevice, Row, Work, evenly_spaced, nbytes
from resq_kernels.bench.hadamard import kron_transform

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3-8b"], "batch": [1, 16, 512]}
EPS = 1e-5
# Another order of float32 additions may round a value to the neighbouring code: at most one code
# away and for at most one value in a thousand (tests/gpu), so one in a row of a few hundred.
MOST_DIFFERING = 0.01
SCALE_TOLERANCE = 2.0**-17  # float32 sums of up to 30000 terms in another order
Quantized = tuple[formats.MixedTensor, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at the widths of a model.

    Attributes:
        op, layer: the operator, and the linear that reads its codes.
        widths: columns of each input.
        exact: whether all codes must equal the reference's.
        ours, reference: inputs -> codes and the new residual, None if the operator has none.
        torch: the same work in plain torch.
    """

    op: str
    layer: str
    widths: tuple[int, ...]
    exact: bool
    ours: Callable[..., Quantized]
    reference: Callable[..., Quantized]
    torch: Callable[..., object]


def torch_quantize(x: torch.Tensor, n_hi: int) -> list[torch.Tensor]:
    """Asymmetric codes per row and part in plain torch, not packed: what a user would write."""
    found = []
    for part, bits in zip(x.split([x.shape[-1] - n_hi, n_hi], dim=-1), (4, 8), strict=True):
        if part.shape[-1] == 0:
            continue
        part, half = part.float(), 2 ** (bits - 1)
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = ((high - low) / (2 * half - 1)).clamp_min(1e-12)
        zero = (-low / scale).round() - half
        codes = ((part / scale).round() + zero).clamp(-half, half - 1)
        found += [codes.to(torch.int8), scale, zero]
    return found


def cases(model: str, device: str) -> list[Case]:
    """The three operators of a decoder layer that quantize."""
    size = models.shape(model)
    n_hi, down_hi = (size.k_hi(name, models.OPTIONS) for name in ("self_attn.q_proj", DOWN_PROJ))
    block = size.hadamard_block(models.OPTIONS)
    # CPUs without BF16 instructions are about ten times slower in BF16 than in float32.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transform = kron_transform(block, device, dtype)

    transformed = (True, down_hi, 4, None, False, 1.0, block)

    def norm_torch(x: torch.Tensor, residual: torch.Tensor) -> object:
        hidden = x + residual
        normed = functional.rms_norm(hidden, hidden.shape[-1:], eps=EPS)
        return hidden, torch_quantize(normed, n_hi)

    def mlp_torch(gate_up: torch.Tensor) -> object:
        gate, up = gate_up.chunk(2, dim=-1)
        parts = [size.intermediate - down_hi, down_hi]
        low, high = (functional.silu(gate) * up).split(parts, dim=-1)
        blocks = transform(low.unflatten(-1, (-1, block))).flatten(-2)
        return torch_quantize(torch.cat([blocks, high], dim=-1), down_hi)

    return [
        Case(
            op="mixed_quantize",
            layer="o",
            widths=(size.hidden,),
            exact=True,
            ours=lambda x: (ops.mixed_quantize(x, n_hi), None),
            reference=lambda x: (reference.mixed_quantize(x, n_hi), None),
            torch=lambda x: torch_quantize(x, n_hi),
        ),
        Case(
            op="rms_norm_quantize",
            layer="qkv",
            widths=(size.hidden, size.hidden),
            exact=False,
            ours=lambda x, residual: ops.rms_norm_quantize(x, residual, None, EPS, n_hi),
            reference=lambda x, r: reference.rms_norm_quantize(x, r, None, EPS, n_hi),
            torch=norm_torch,
        ),
        Case(
            op="silu_mul_hadamard_quantize",
            layer="down",
            widths=(2 * size.intermediate,),
            exact=False,
            ours=lambda x: (ops.silu_mul_hadamard_quantize(x, *transformed), None),
            reference=lambda x: (reference.silu_mul_hadamard_quantize(x, *transformed), None),
            torch=mlp_torch,
        ),
    ]


def agrees(case: Case, inputs: list[torch.Tensor], result: Quantized) -> bool:
    """Whether the result agrees with the reference in rows `evenly_spaced`.

    Compares code - zero, because a zero point that rounds the other way shifts all codes of its
    row.
    """
    rows = evenly_spaced(len(inputs[0]))
    expected, expected_residual = case.reference(*(x.cpu()[rows] for x in inputs))
    codes, residual = result
    if residual is not None and (
        expected_residual is None or not torch.equal(residual.cpu()[rows], expected_residual)
    ):
        return False
    got, wanted = (
        _parts(q) for q in (formats.MixedTensor(*(t.cpu()[rows] for t in codes)), expected)
    )
    for (mine, zero, scale), (right, right_zero, right_scale) in zip(got, wanted, strict=True):
        if mine.shape != right.shape:
            return False
        if case.exact and not (torch.equal(mine, right) and torch.equal(zero, right_zero)):
            return False
        if not torch.allclose(scale, right_scale, rtol=SCALE_TOLERANCE, atol=0.0):
            return False
        difference = ((mine - zero[:, None]) - (right - right_zero[:, None])).abs()
        if mine.numel() and (
            difference.max() > 1 or (difference > 0).double().mean() > MOST_DIFFERING
        ):
            return False
    return True


def _parts(quantized: formats.MixedTensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(codes, zero, scale) of the low and of the high part, in float64."""
    q_lo, q_hi, params = quantized
    q_lo = formats.unpack_int4(q_lo) if q_lo.dtype == torch.uint8 else q_lo
    scale_lo, zero_lo, scale_hi, zero_hi = params.double().unbind(-1)
    return [(q_lo.double(), zero_lo, scale_lo), (q_hi.double(), zero_hi, scale_hi)]


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, operator and batch.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch.
        missing: stays as it is: torch always has this baseline.
    """
    for model in args.shapes:
        for case in cases(model, bench.device):
            for m in args.batch:
                inputs = [
                    torch.randn(m, width, device=bench.device, dtype=torch.bfloat16)
                    for width in case.widths
                ]
                yield from bench.attempted(partial(_rows, bench, model, case, inputs))


def _rows(bench: BenchDevice, model: str, case: Case, inputs: list[torch.Tensor]) -> list[Row]:
    result, shape = case.ours(*inputs), list(inputs[0].shape)
    if not agrees(case, inputs, result):
        size = "x".join(map(str, shape))
        raise RuntimeError(f"{case.op}: {model} {size}: differs from the reference")
    data = list(zip(*map(bench.copies, inputs), strict=True))
    times = bench.alternate(
        {
            "ours": lambda i: case.ours(*data[i % len(data)]),
            "torch": lambda i: case.torch(*data[i % len(data)]),
        }
    )
    place: Row = {"model": model, "layer": case.layer, "batch": shape[0], "shape": shape}
    work = Work(op=case.op, place=place, moved=nbytes(*inputs, result), copies=True)
    return bench.rows(work, times)
