"""The specification of every operator in plain torch: same names, same arguments, same results.

Tests, calibration and `resq eval --fake-quant` compute with these functions; no operator falls back
to them. ops.py has the operators on rows, attention.py those of the KV cache, kv_pages.py the
encoder and decoder of its pages.
"""

from __future__ import annotations

from resq_kernels.reference.attention import (
    apply_rope,
    kv_append,
    kv_attention,
    kv_dequantize,
    kv_fake_quantize,
)
from resq_kernels.reference.ops import (
    embedding,
    gptq_block,
    hadamard,
    mixed_gemm,
    mixed_quantize,
    rms_norm,
    rms_norm_quantize,
    search_scale,
    silu_mul_hadamard_quantize,
)

__all__ = [
    "apply_rope",
    "embedding",
    "gptq_block",
    "hadamard",
    "kv_append",
    "kv_attention",
    "kv_dequantize",
    "kv_fake_quantize",
    "mixed_gemm",
    "mixed_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "search_scale",
    "silu_mul_hadamard_quantize",
]
