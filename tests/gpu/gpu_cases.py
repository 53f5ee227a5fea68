"""Inputs for the tests on a GPU, drawn on the CPU, and the comparison with the CPU's operators.

The CPU's operators have the bits of the reference (tests/ops), and they are quick enough for real
layer sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resq_kernels.formats import pack_int4, unpack_int4, weight_sums

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (hidden size, intermediate size, rows of the fused q, k and v): every Llama 2, 3 and 3.x and
# Qwen2.5 shape that differs from the others.
MODELS = {
    "qwen2.5-0.5b": (896, 4864, 1152),
    "qwen2.5-1.5b": (1536, 8960, 2048),
    "llama-3.2-1b": (2048, 8192, 3072),
    "qwen2.5-7b": (3584, 18944, 4608),
    "llama-3-8b": (4096, 14336, 6144),
    "llama-2-7b": (4096, 11008, 12288),
    "qwen2.5-14b": (5120, 13824, 7168),
    "qwen2.5-32b": (5120, 27648, 7168),
    "llama-3-70b": (8192, 28672, 10240),
    "qwen2.5-72b": (8192, 29568, 10240),
}
HADAMARD_SIZES = sorted({wide for _, wide, _ in MODELS.values()})


# The others' N is cut, to keep the suite within minutes: drawing and packing codes takes the time.
WHOLE = ("llama-3-8b", "llama-3-70b")
LARGEST_N = 6144


def layers(model: str) -> list[tuple[str, int, int, int]]:
    """(layer, N, K_lo, K_hi) of a decoder layer's four products."""
    hidden, wide, qkv = MODELS[model]
    low, high = hidden - hidden // 8, hidden // 8
    largest = 2 * wide if model in WHOLE else LARGEST_N
    return [
        ("qkv", min(qkv, largest), low, high),
        ("o", min(hidden, largest), low, high),
        ("gate_up", min(2 * wide, largest), low, high),
        ("down", min(hidden, largest), wide, 0),
    ]


def codes(bits: int, *shape: int) -> torch.Tensor:
    """Uniform signed codes of `bits` bits, int8."""
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8)


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
