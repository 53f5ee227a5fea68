"""ResQ: Llama and Qwen2.5 models in 4 bits (weights, activations, KV cache) with real kernels."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import resq_kernels_autoload
from resq_kernels.config import ResQConfig

if TYPE_CHECKING:
    from resq_kernels import ops as ops
    from resq_kernels.api import from_pretrained, quantize
    from resq_kernels.integrations.float_model import dequantize
    from resq_kernels.nn.decode_graph import DecodeGraph
    from resq_kernels.nn.generation import graph_decoding
    from resq_kernels.nn.kv_cache import ResQCache
    from resq_kernels.nn.linear import ResQLinear

__version__ = "0.1.0"
__all__ = [
    "DecodeGraph",
    "ResQCache",
    "ResQConfig",
    "ResQLinear",
    "dequantize",
    "from_pretrained",
    "graph_decoding",
    "quantize",
]

# Imported on first use, because their modules import transformers.
_LAZY = {
    "DecodeGraph": "resq_kernels.nn.decode_graph",
    "ResQCache": "resq_kernels.nn.kv_cache",
    "ResQLinear": "resq_kernels.nn.linear",
    "dequantize": "resq_kernels.integrations.float_model",
    "from_pretrained": "resq_kernels.api",
    "graph_decoding": "resq_kernels.nn.generation",
    "quantize": "resq_kernels.api",
}

# The program (`resq`, `python -m resq_kernels`) answers --help and usage errors without torch: its
# import takes longer than everything else. What a command runs imports the operators itself.
_PROGRAM = "resq_kernels_program" in sys.modules or sys.orig_argv[1:3] == ["-m", "resq_kernels"]

resq_kernels_autoload.register()
if not _PROGRAM:
    importlib.import_module("resq_kernels.ops")  # registers torch.ops.resq.*


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'resq_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
