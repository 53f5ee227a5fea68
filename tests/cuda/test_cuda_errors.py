"""Errors of the CUDA operators: one sentence, before any launch."""

from __future__ import annotations

import emulation
import pytest
import torch

from resq_kernels.formats import pack_int4, weight_sums

N, K_LO, K_HI, ROWS = 64, 448, 64, 5


def arguments(device: emulation.Emulated) -> dict[str, torch.Tensor | None | torch.dtype]:
    """Good arguments of mixed_gemm by name."""
    codes_lo = pack_int4(torch.randint(-8, 8, (N, K_LO), dtype=torch.int8))
    codes_hi = torch.randint(-128, 128, (N, K_HI), dtype=torch.int8)
    return {
        "q_lo": torch.randint(0, 256, (ROWS, K_LO // 2), dtype=torch.uint8),
        "q_hi": torch.randint(-128, 128, (ROWS, K_HI), dtype=torch.int8),
        "params": torch.ones(ROWS, 4),
        "packed_weight": device.pack_weight(codes_lo, codes_hi).clone(),
        "weight_scale": torch.ones(N, 2),
        "weight_sum": weight_sums(codes_lo, codes_hi),
        "bias": None,
        "out_dtype": torch.float16,
    }


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element past an aligned address."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    memory[1:] = tensor.flatten()
    return memory[1:].view_as(tensor)


WRONG = {
    "q_lo": [
        (
            lambda t: t.float(),
            r"expected uint8 or int8 \[5, 224\] contiguous, got float32 \[5, 224\]",
        ),
        (shifted, r"expected memory aligned to 16 bytes \(clone\(\) a slice that is not\), got an"),
    ],
    "q_hi": [(lambda t: t[:, ::2], r"expected int8 \[5, \*\] contiguous, got .*not contiguous")],
    "params": [(lambda t: t[:4], r"expected float32 \[5, 4\] contiguous, got float32 \[4, 4\]")],
    "packed_weight": [
        (lambda t: t[:-1], "expected 18432 bytes for 64 rows .* got 18431 bytes"),
        (shifted, "expected memory aligned to 16 bytes"),
    ],
    "weight_scale": [(lambda t: t.half(), r"expected float32 \[\*, 2\] contiguous, got float16")],
    "weight_sum": [(lambda t: t[1:], r"expected int32 \[64, 2\] contiguous, got int32 \[63, 2\]")],
    "bias": [(lambda _: torch.ones(7), r"expected .* \[64\] contiguous, got float32 \[7\]")],
    "out_dtype": [(lambda _: torch.float64, "expected float32, float16 or bfloat16, got float64")],
}


@pytest.mark.parametrize("argument", WRONG)
def test_mixed_gemm_names_the_argument(argument: str, device: emulation.Emulated) -> None:
    for spoil, message in WRONG[argument]:
        given = arguments(device)
        given[argument] = spoil(given[argument])
        with pytest.raises(RuntimeError, match=f"mixed_gemm: {argument}: {message}"):
            device.mixed_gemm(*given.values())


def test_a_device_that_is_too_old_is_named(device: emulation.Emulated) -> None:
    device.arch = 75
    with pytest.raises(RuntimeError, match="resq: device: expected sm_80 or newer .*, got sm_75"):
        device.cuda_family(device.index)
