"""mixed_quantize: rows of activations to INT4 and INT8 codes. Shapes: ... any batch, K columns."""

from __future__ import annotations

import torch

from resq_kernels import _library
from resq_kernels.formats import MixedTensor


def mixed_quantize(
    x: torch.Tensor,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> MixedTensor:
    """Quantizes each row: the first K - n_hi columns to `lo_bits` bits, the last n_hi to 8 bits.

    Formula: x ~ scale * (code - zero) per row and part; with lo, hi = min(x), max(x) of the part,
    in the low part times clip: asymmetric scale = (max(hi, 0) - min(lo, 0)) / (2^bits - 1) and
    zero = round(-min(lo, 0) / scale) - 2^(bits - 1), symmetric scale = max(-lo, hi) /
    (2^(bits - 1) - 1) and zero = 0; code = clamp(round(x / scale) + zero). Every rounding is
    stated in docs/formats.md section 2; the bits do not depend on the instruction set.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        n_hi: columns of the INT8 part, 0 to K.
        lo_bits: 4 or 8.
        packed: True: two 4-bit codes a byte (K - n_hi even, lo_bits 4); False: a byte per code;
            None: the one that is faster for `mixed_gemm` on x's device (CPU: False).
        symmetric: zero = 0.
        clip: factor on the range of the low part, in (0, 1].

    Returns:
        MixedTensor(q_lo uint8 [..., (K - n_hi) / 2] or int8 [..., K - n_hi], q_hi int8 [..., n_hi],
        params float32 [..., 4]). A part that holds NaN or an infinity has scale NaN and codes 0.

    Raises:
        RuntimeError: dtype, n_hi, lo_bits, packed or clip is outside what is stated above.

    Source: ResQ (arXiv 2412.14363) section 4.1, per-token quantization of the two subspaces.
    """
    return MixedTensor(
        *_library.call(
            torch.ops.resq.mixed_quantize.default, x, n_hi, lo_bits, packed, symmetric, clip
        )
    )


def packs_activations(device: torch.device) -> bool:
    """Whether `packed=None` packs nibbles: on devices with INT4 tensor cores (sm_80 to 89)."""
    if device.type != "cuda":
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    return str(torch.ops.resq.cuda_family(index)) == "sm80"


def mixed_outputs(
    like: torch.Tensor, columns: int, n_hi: int, lo_bits: int, packed: bool | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty (q_lo, q_hi, params) for rows of `columns` columns batched as `like`, for fakes."""
    batch = like.shape[:-1]
    k_lo = columns - n_hi
    if packed is None:
        packed = lo_bits == 4 and k_lo % 2 == 0 and packs_activations(like.device)
    return (
        like.new_empty([*batch, k_lo // 2], dtype=torch.uint8)
        if packed
        else like.new_empty([*batch, k_lo], dtype=torch.int8),
        like.new_empty([*batch, n_hi], dtype=torch.int8),
        like.new_empty([*batch, 4], dtype=torch.float32),
    )


@_library.register_fake("mixed_quantize")
def _(
    x: torch.Tensor,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mixed_outputs(x, x.shape[-1], n_hi, lo_bits, packed)
