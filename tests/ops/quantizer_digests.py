"""Prints a digest of every output of the quantizing ops on fixed inputs, as JSON.

Run by test_instruction_sets.py once per instruction set, in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

import resq_kernels  # noqa: F401  registers torch.ops.resq.*

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [1, 2, 7, 16, 50, 64, 130, 257, 1000]
HADAMARD_SIZES = [1, 2, 4, 8, 16, 32, 64, 512, 12, 24, 76, 152, 344, 336, 560, 1232, 688, 29568]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, -3e38]


def digest(tensors: tuple[torch.Tensor, ...]) -> str:
    data = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_floating_point():  # NaN is NaN, whatever its sign
            tensor = torch.where(tensor.isnan(), torch.nan, tensor)
        data.update(repr((tensor.dtype, tensor.shape)).encode())
        data.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return data.hexdigest()


def rows(generator: torch.Generator, k: int, dtype: torch.dtype) -> torch.Tensor:
    """13 rows of magnitudes from e^-40 to e^40; the last nine hold one special value each."""
    x = torch.randn(13, k, generator=generator)
    x *= (torch.randn(13, 1, generator=generator) * 13).exp()
    for i, value in enumerate(SPECIAL):
        x[4 + i, int(torch.randint(k, (1,), generator=generator))] = value
    return x.to(dtype)


def digests() -> dict[str, str]:
    generator = torch.Generator().manual_seed(20240607)
    ops = torch.ops.resq
    result = {}
    for dtype in FLOAT_TYPES:
        for k in SIZES:
            x, residual = rows(generator, k, dtype), rows(generator, k, dtype)
            weight = torch.randn(k, generator=generator).to(dtype)
            for bits in (4, 8):
                scale = ops.search_scale(x, bits)
                result[f"search_scale {dtype} {k} {bits}"] = digest((scale,))
                columns = x.float()  # 13 of k rows
                feedback = torch.randn(13, 13, generator=generator)
                given = (columns, columns, feedback, columns[0].abs() + 1e-3, bits)
                result[f"gptq_block {dtype} {k} {bits}"] = digest(ops.gptq_block(*given))
            result[f"rms_norm {dtype} {k}"] = digest((ops.rms_norm(x, weight, 1e-5),))
            n_hi = k // 8 if (k - k // 8) % 2 == 0 else k % 2
            for packed in (False, True):
                for symmetric in (False, True):
                    options = (4, packed, symmetric, 0.95)
                    name = f"{dtype} {k} {packed} {symmetric}"
                    result[f"mixed_quantize {name}"] = digest(ops.mixed_quantize(x, n_hi, *options))
                    result[f"rms_norm_quantize {name}"] = digest(
                        ops.rms_norm_quantize(x, residual, weight, 1e-5, n_hi, *options)
                    )
        for n in HADAMARD_SIZES:
            x, gate_up = rows(generator, n, dtype), rows(generator, 2 * n, dtype)
            result[f"hadamard {dtype} {n}"] = digest((ops.hadamard(x, 0.7),))
            for hadamard in (False, True):
                result[f"silu_mul_hadamard_quantize {dtype} {n} {hadamard}"] = digest(
                    ops.silu_mul_hadamard_quantize(gate_up, hadamard, n // 8)
                )
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({"isa": torch.ops.resq.cpu_isa(), "digests": digests()}, sys.stdout)
