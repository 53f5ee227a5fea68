"""Typed wrappers of torch.ops.resq.*: one module per operator, named after it."""

from resq_kernels.ops.mixed_gemm import mixed_gemm
from resq_kernels.ops.pack_weight import pack_weight
from resq_kernels.ops.unpack_weight import unpack_weight

__all__ = [
    "mixed_gemm",
    "pack_weight",
    "unpack_weight",
]
