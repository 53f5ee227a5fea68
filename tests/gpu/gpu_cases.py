"""Inputs for the tests on a GPU, and the comparison with the CPU's operators.

The CPU's operators have the bits of the reference (tests/ops), and they are quick enough for real
layer sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resq_kernels import kv_pages
from resq_kernels.bench import models
from resq_kernels.formats import pack_int4, unpack_int4, weight_sums

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The models whose layer sizes are tried first; the others are `every_model`. LARGEST_N cuts the N
# of the others: drawing and packing codes takes the time.
CHOSEN = ("llama-3-8b", "qwen2.5-7b")
OTHERS = [
    pytest.param(name, marks=pytest.mark.every_model)
    for name in models.names()
    if name not in CHOSEN
]
WHOLE = ("llama-3-8b", "llama-3-70b")
LARGEST_N = 6144
HADAMARD_SIZES = sorted({models.shape(name).intermediate for name in models.names()})


def layers(model: str) -> list[tuple[str, int, int, int]]:
    """(layer, N, K_lo, K_hi) of a decoder layer's four products."""
    largest = LARGEST_N if model not in WHOLE else 1 << 30
    return [(name, min(n, largest), k - high, high) for name, n, k, high in models.layers(model)]


def codes(bits: int, *shape: int) -> torch.Tensor:
    """Uniform signed codes of `bits` bits, int8; drawn on the GPU, which takes no time."""
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, device="cuda").cpu()


class Weight:
    """Canonical codes of a layer, packed on whatever device asks."""

    def __init__(self, n: int, k_lo: int, k_hi: int) -> None:
        self.codes = pack_int4(codes(4, n, k_lo)), codes(8, n, k_hi)
        self.scale = torch.rand(n, 2) + 0.1
        self.sums = weight_sums(*self.codes)

    def arguments(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(packed_weight, weight_scale, weight_sum) on the device."""
        packed = torch.ops.resq.pack_weight(*(part.to(device) for part in self.codes))
        return packed, self.scale.to(device), self.sums.to(device)


def activations(
    rows: int, k_lo: int, k_hi: int, form: str = "packed"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q_lo, q_hi, params); form: packed nibbles, 4-bit codes in bytes, or 8-bit codes."""
    q_lo = codes(8 if form == "8 bits" else 4, rows, k_lo)
    params = torch.rand(rows, 4) + 0.1
    params[:, 1::2] = torch.randint(-128, 128, (rows, 2)).float()
    return pack_int4(q_lo) if form == "packed" else q_lo, codes(8, rows, k_hi), params


def gemm_on_both(
    weight: Weight, rows: tuple, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple:
    mixed_gemm = torch.ops.resq.mixed_gemm
    expected = mixed_gemm(*rows, *weight.arguments("cpu"), bias, dtype)
    return expected, mixed_gemm(*on("cuda", (*rows, *weight.arguments("cuda"), bias)), dtype).cpu()


def cached(lengths: list[int], heads: tuple, page_size: int, dtype: torch.dtype) -> tuple:
    """Arguments of kv_append for all tokens of the sequences, a cache of NaN bits, block table."""
    _, n_kv, head_dim = heads
    tokens, most = sum(lengths), -(-max(lengths) // page_size)
    shape = kv_pages.cache_shape(len(lengths) * most, n_kv, page_size, head_dim)
    cache = torch.full(shape, 255, dtype=torch.uint8)
    table = torch.randperm(shape[0]).int().view(len(lengths), most)
    slots = [
        table[i, torch.arange(n) // page_size].long() * page_size + torch.arange(n) % page_size
        for i, n in enumerate(lengths)
    ]
    k, v = torch.randn(2, tokens, n_kv, head_dim).to(dtype)
    angles = (torch.rand(tokens, head_dim // 2) * 6.3).repeat(1, 2)
    rotation = torch.linalg.qr(torch.randn(1, head_dim, head_dim))[0].half().contiguous()
    append = (k, v, angles.cos().to(dtype), angles.sin().to(dtype), rotation)
    return append, cache, torch.cat(slots), table


def on(device: str, value: Any) -> Any:
    """Moves tensors, also inside tuples; leaves everything else."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(on(device, v) for v in value) if isinstance(value, tuple) else value


def cpu_and_cuda(op: str, *args: Any) -> tuple[Any, Any]:
    """The operator's results on both devices, both on the CPU."""
    function: Callable = getattr(torch.ops.resq, op)
    return function(*args), on("cpu", function(*on("cuda", args)))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def assert_codes_agree(ours: tuple, expected: tuple, share: float = 1e-3) -> None:
    """Codes differ by at most 1, in at most `share` of the places; parameters by rounding.

    A zero point that rounds the other way moves every code of its row by one, so rows whose zero
    differs are compared as values and counted with the differing codes.
    """
    params, wanted = ours[2].double(), expected[2].double()
    scale_error = (params[..., ::2] - wanted[..., ::2]).abs() / wanted[..., ::2].abs().clamp_min(
        1e-30
    )
    assert scale_error.max() < 2**-18, f"scales differ by {scale_error.max():.3g}"
    for part in (0, 1):
        a, b = (
            unpack_int4(t[part]) if t[part].dtype == torch.uint8 else t[part]
            for t in (ours, expected)
        )
        if a.numel() == 0:
            continue
        zero = 2 * part + 1
        difference = (a.double() - params[..., zero, None]) - (b.double() - wanted[..., zero, None])
        assert difference.abs().max() <= 1, "a code differs by more than 1"
        assert (difference != 0).double().mean() <= share, "too many codes differ"
