"""CUTLASS's mixed-input GEMM of 4-bit weights, 8-bit activations (benchmarks/cuda/cutlass_s4s8.cu).

A machine with a GPU may have no nvcc, so the library is built beforehand:

    RESQ_CUDA_BENCHMARKS=1 python setup.py build_ext --inplace
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from resq_kernels.bench.device import evenly_spaced

# In a checkout; a wheel does not contain it.
LIBRARY = Path(__file__).resolve().parents[2] / "benchmarks/cuda/cutlass_s4s8.so"
CHECKED_COLUMNS = 256


class CutlassS4S8:
    """The functions of one library; tests pass one that was built for the emulator."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cutlass_s4s8_workspace.restype = ctypes.c_int64
        library.cutlass_s4s8_error.restype = ctypes.c_char_p

    def workspace(self, m: int, n: int, k: int, device: torch.device) -> torch.Tensor:
        """The uint8 workspace of calls of one size; calls on one stream can share it.

        Raises:
            ValueError: N or K do not fit the kernel's 16-byte copies.
        """
        if k % 32 or n % 8:
            raise ValueError(f"cutlass_s4s8: expected N % 8 == 0 and K % 32 == 0, got {n} and {k}")
        size = self._library.cutlass_s4s8_workspace(m, n, k)
        return torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        row_scale: torch.Tensor,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> torch.Tensor:
        """Writes x times the weight's transpose, scaled, into `out`, and returns it.

        Args:
            weight: uint8 [N, K / 2], codes packed by `formats.pack_int4`.
            x: int8 [M, K].
            weight_scale: float32 [N].
            row_scale: float32 [M].
            out: bfloat16 [M, N].
            workspace: from `workspace()`; overwritten.

        Raises:
            RuntimeError: CUTLASS refuses the call.
        """
        (m, k), n = x.shape, len(weight)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        tensors = [weight, x, weight_scale, row_scale, out, workspace]
        *pointers, scratch = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        code = self._library.cutlass_s4s8_launch(
            *pointers, m, n, k, scratch, ctypes.c_void_p(stream)
        )
        if code:
            error = self._library.cutlass_s4s8_error(code).decode()
            raise RuntimeError(f"cutlass_s4s8: {m}x{n}x{k}: expected success, got {error}")
        return out


def load() -> CutlassS4S8:
    """The library that was built beforehand.

    Raises:
        RuntimeError: it does not exist, cannot be opened, or the device is not sm_90.
    """
    if not LIBRARY.exists():
        raise RuntimeError(
            f"expected benchmarks/cuda/{LIBRARY.name}, found none (docs/cuda.md: how to build it)"
        )
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise RuntimeError("takes compute capability 9.0, got {}.{}".format(*capability))
    try:
        return CutlassS4S8(ctypes.CDLL(str(LIBRARY)))
    except OSError as error:
        raise RuntimeError(str(error)) from error


def check(
    y: torch.Tensor,
    codes: torch.Tensor,
    x: torch.Tensor,
    weight_scale: torch.Tensor,
    row_scale: torch.Tensor,
) -> None:
    """Compares evenly spaced elements with exact integer sums, scaled in the same order.

    Args:
        y: bfloat16 [M, N].
        codes: the weight's codes, int8 [N, K].
        x, weight_scale, row_scale: the other arguments of the call.

    Raises:
        RuntimeError: a value differs in any bit.
    """
    rows = evenly_spaced(y.shape[0]).to(y.device)
    columns = evenly_spaced(y.shape[1], CHECKED_COLUMNS).to(y.device)
    sums = x[rows].double() @ codes[columns].double().T  # exact: below 2^53
    expected = (sums.float() * weight_scale[columns] * row_scale[rows, None]).bfloat16()
    if wrong := int((y[rows][:, columns] != expected).sum()):
        size = f"{len(x)}x{len(codes)}x{x.shape[1]}"
        raise RuntimeError(
            f"cutlass_s4s8: {size}: expected the integer product, got {wrong} other values of "
            f"{expected.numel()}"
        )
