"""What each small kernel of a decoder layer costs in a chain of launches.

On a GPU a graph holds 100 calls on the same data, which the L2 then holds: what is left is the
latency of a launch and of the kernel. Results are compared with the reference before they are
timed. The alternative is the smallest kernel of torch, in the same kind of chain.

    resq bench latency --shapes llama-3-8b --batch 1,16
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from resq_kernels import kv_pages, ops, reference
from resq_kernels.bench import attention, hadamard, models, quantize
from resq_kernels.bench.device import BenchDevice, Call, Row, Work, nbytes

MODELS = models.names()
DEFAULTS = {"shapes": ["llama-3-8b"], "batch": [1, 16], "context": [1024]}
SMALLEST = "torch add of one"
CALLS = 100  # in a graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A call of a decode step.

    Attributes:
        op, layer: the operator, and where in a layer it is.
        tensors: all that it reads and writes; the first gives the row its shape.
        right: whether its result agrees with the reference.
        call: the call.
    """

    op: str
    layer: str
    tensors: tuple[torch.Tensor, ...]
    right: bool
    call: Call


def quantizer(bench: BenchDevice, case: quantize.Case, batch: int) -> Kernel:
    """One of the quantizing operators."""
    inputs = [
        torch.randn(batch, width, device=bench.device, dtype=torch.bfloat16)
        for width in case.widths
    ]
    codes, residual = case.ours(*inputs)
    return Kernel(
        op=case.op,
        layer=case.layer,
        tensors=(*inputs, *codes, *([] if residual is None else [residual])),
        right=quantize.agrees(case, inputs, (codes, residual)),
        call=lambda i: case.ours(*inputs),
    )


def transform(bench: BenchDevice, model: str, batch: int) -> Kernel:
    """hadamard at the width of the MLP."""
    width = models.shape(model).intermediate
    x = torch.randn(batch, width, device=bench.device, dtype=torch.bfloat16)
    y = ops.hadamard(x)
    right = hadamard.agrees(y, x)
    return Kernel(
        op="hadamard", layer="down", tensors=(x, y), right=right, call=lambda i: ops.hadamard(x)
    )


def append(bench: BenchDevice, model: str, batch: int) -> Kernel:
    """kv_append of one token a sequence, with its RoPE, rotation and queries."""
    n_q, n_kv, head_dim = models.heads(model)
    k, v = torch.randn(2, batch, n_kv, head_dim).bfloat16()
    q = torch.randn(batch, n_q, head_dim).bfloat16()
    angles = torch.rand(batch, head_dim // 2).repeat(1, 2) * 6.3
    rotation = torch.linalg.qr(torch.randn(1, head_dim, head_dim))[0].half().contiguous()
    rope = (angles.cos().bfloat16(), angles.sin().bfloat16())
    shape = kv_pages.cache_shape(batch, n_kv, kv_pages.DEFAULT_PAGE_SIZE, head_dim)
    pages = torch.zeros(shape, dtype=torch.uint8)
    slots = torch.arange(batch) * kv_pages.DEFAULT_PAGE_SIZE
    k2, v2, cos, sin, rotation2, cache, places, queries = (
        tensor.to(bench.device).clone() for tensor in (k, v, *rope, rotation, pages, slots, q)
    )

    def call(i: int) -> torch.Tensor | None:
        return ops.kv_append(k2, v2, cos, sin, rotation2, cache, places, q=queries)

    rotated = call(0)
    reference.kv_append(k, v, *rope, rotation, pages, slots)
    return Kernel(
        op="kv_append",
        layer="qkv",
        tensors=(k2, v2, cos, sin, rotation2, queries, *([] if rotated is None else [rotated])),
        right=torch.equal(cache.cpu(), pages),
        call=call,
    )


def attend(bench: BenchDevice, model: str, batch: int, context: int) -> Kernel:
    """kv_attention of one query a sequence."""
    n_q, _, head_dim = heads = models.heads(model)
    cache, table = attention.random_cache(batch, context, heads, bench.device)
    decode = attention.decoder(batch, context, bench.device)
    q = torch.randn(batch, n_q, head_dim, device=bench.device, dtype=torch.bfloat16)
    out = decode(q, cache, table)
    return Kernel(
        op="kv_attention",
        layer=f"decode {context}",
        tensors=(q, cache, out),
        right=attention.check(out, q, cache, table, context),
        call=lambda i: decode(q, cache, table),
    )


def kernels(
    bench: BenchDevice, model: str, batch: int, context: int
) -> Iterator[Callable[[], Kernel]]:
    """Functions that set up every small kernel of a decode step."""
    for case in quantize.cases(model, bench.device):
        yield partial(quantizer, bench, case, batch)
    yield partial(transform, bench, model, batch)
    yield partial(append, bench, model, batch)
    yield partial(attend, bench, model, batch, context)


def rows(bench: BenchDevice, args: argparse.Namespace, missing: dict[str, str]) -> Iterator[Row]:
    """Checks and times every model, batch and kernel.

    Args:
        bench: the device; its `failures` receive what is wrong, which is not timed.
        args: the options of `resq bench`: shapes, batch, context (of kv_attention).
        missing: stays as it is.
    """
    for model in args.shapes:
        for context in args.context:
            for batch in args.batch:
                for kernel in kernels(bench, model, batch, context):
                    yield from bench.attempted(partial(_rows, bench, model, batch, kernel))


def _rows(bench: BenchDevice, model: str, batch: int, make: Callable[[], Kernel]) -> list[Row]:
    kernel, one = make(), torch.zeros(1, device=bench.device)
    if not kernel.right:
        raise RuntimeError(f"{kernel.op}: {model} {batch}: differs from the reference")
    candidates: dict[str, Call] = {"ours": kernel.call, SMALLEST: lambda i: one.add_(1)}
    place: Row = {"model": model, "layer": kernel.layer, "batch": batch}
    place["shape"] = list(kernel.tensors[0].shape)
    work = Work(op=kernel.op, place=place, moved=nbytes(*kernel.tensors), copies=True)
    return bench.rows(work, bench.alternate(candidates, calls=CALLS))
