"""ResQ: Llama and Qwen2.5 models in 4 bits (weights, activations, KV cache) with real kernels."""

from resq_kernels import _library  # noqa: F401  registers torch.ops.resq.*
from resq_kernels.config import ResQConfig

__version__ = "0.1.0"
__all__ = ["ResQConfig", "__version__"]
