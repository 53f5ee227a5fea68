"""Typed wrappers of torch.ops.resq.*: one module per operator, named after it."""

from resq_kernels.ops.decode_step import decode_step, prepare_decode_step
from resq_kernels.ops.decoder_layers import decoder_layers
from resq_kernels.ops.embedding import embedding
from resq_kernels.ops.gptq_block import gptq_block
from resq_kernels.ops.hadamard import hadamard
from resq_kernels.ops.kv_append import kv_append
from resq_kernels.ops.kv_attention import kv_attention
from resq_kernels.ops.kv_dequantize import kv_dequantize
from resq_kernels.ops.mixed_gemm import mixed_gemm
from resq_kernels.ops.mixed_quantize import mixed_quantize
from resq_kernels.ops.pack_weight import pack_weight
from resq_kernels.ops.rms_norm import rms_norm
from resq_kernels.ops.rms_norm_quantize import rms_norm_quantize
from resq_kernels.ops.search_scale import search_scale
from resq_kernels.ops.silu_mul_hadamard_quantize import silu_mul_hadamard_quantize
from resq_kernels.ops.unpack_weight import unpack_weight

__all__ = [
    "decode_step",
    "decoder_layers",
    "embedding",
    "gptq_block",
    "hadamard",
    "kv_append",
    "kv_attention",
    "kv_dequantize",
    "mixed_gemm",
    "mixed_quantize",
    "pack_weight",
    "rms_norm",
    "rms_norm_quantize",
    "prepare_decode_step",
    "search_scale",
    "silu_mul_hadamard_quantize",
    "unpack_weight",
]
