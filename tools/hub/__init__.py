"""INT4 and INT8 operators of ResQ: quantizers, product, transforms, attention over a 4-bit cache.

The `__init__.py` of builds for the Hugging Face hub, beside whose modules it lies there
(tools/hub_kernel.py).
"""

from .formats import MixedTensor, PackedWeight, QuantizedWeight
from .kv_pages import cache_shape
from .ops import *  # noqa: F403
from .ops import __all__ as _operators
from .weights import quantize_weight

__all__ = [
    *_operators,
    "MixedTensor",
    "PackedWeight",
    "QuantizedWeight",
    "cache_shape",
    "quantize_weight",
]
