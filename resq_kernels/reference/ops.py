"""The specification of the quantizers, the transform, the embedding and the GEMM."""

from __future__ import annotations

import torch

from resq_kernels import hadamard as _hadamard
from resq_kernels.formats import MixedTensor, pack_int4, unpack_int4

MIN_SCALE = 2.0**-60


def _quantize_part(
    x: torch.Tensor, bits: int, symmetric: bool, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [..., K] -> signed codes int8 [..., K], scale [...], zero [...] (float32)."""
    half = 2 ** (bits - 1)
    if x.shape[-1] == 0:
        zeros = x.new_zeros(x.shape[:-1])
        return x.to(torch.int8), zeros, zeros.clone()
    lo, hi = x.amin(-1) * clip, x.amax(-1) * clip
    if symmetric:
        amax = torch.maximum(-lo, hi)
        scale = torch.where(amax > 0, (amax / (half - 1)).clamp_min(MIN_SCALE), 1.0)
        zero = torch.zeros_like(scale)
    else:
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)
        empty = (lo == 0) & (hi == 0)
        lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
        scale = ((hi - lo) / (2 * half - 1)).clamp_min(MIN_SCALE)
        zero = torch.round(-lo * (1.0 / scale)) - half
    inv_scale = (1.0 / scale).unsqueeze(-1)
    codes = (torch.round(x * inv_scale) + zero.unsqueeze(-1)).clamp(-half, half - 1)
    # A row with a NaN or an infinity dequantizes to NaN: its scale is NaN, its codes are 0.
    finite = torch.isfinite(x).all(-1)
    scale = torch.where(finite, scale, torch.nan)
    zero = torch.where(finite, zero, 0.0)
    return torch.where(finite.unsqueeze(-1), codes, 0.0).to(torch.int8), scale, zero


def mixed_quantize(
    x: torch.Tensor,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> MixedTensor:
    """Quantizes each row: its first K - n_hi columns to `lo_bits` bits, its last n_hi to 8 bits.

    A part without columns has scale 0 and zero 0.
    """
    x = x.float()
    k_lo = x.shape[-1] - n_hi
    q_lo, scale_lo, zero_lo = _quantize_part(x[..., :k_lo], lo_bits, symmetric, clip)
    q_hi, scale_hi, zero_hi = _quantize_part(x[..., k_lo:], 8, symmetric, 1.0)
    params = torch.stack([scale_lo, zero_lo, scale_hi, zero_hi], dim=-1)
    return MixedTensor(pack_int4(q_lo) if packed else q_lo, q_hi, params)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded to x's dtype."""
    exact = x.float()
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    n_hi: int,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
) -> tuple[MixedTensor, torch.Tensor]:
    """new_residual = x + residual in x's dtype; mixed_quantize(rms_norm(new_residual))."""
    new_residual = x if residual is None else x + residual
    normed = rms_norm(new_residual.float(), weight, eps)
    return mixed_quantize(normed, n_hi, lo_bits, packed, symmetric, clip), new_residual


def hadamard(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * H x / sqrt(n) over the last dimension, computed in float32, rounded to x's dtype."""
    return (_hadamard.transform(x.float()) * scale).to(x.dtype)


def silu_mul_hadamard_quantize(
    gate_up: torch.Tensor,
    hadamard: bool = True,
    n_hi: int = 0,
    lo_bits: int = 4,
    packed: bool | None = None,
    symmetric: bool = False,
    clip: float = 1.0,
    hadamard_block: int = 0,
) -> MixedTensor:
    """mixed_quantize(H(silu(gate) * up)); gate is the first half of the last dimension."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    if hadamard:
        product = _hadamard.transform_low(product, n_hi, hadamard_block)
    return mixed_quantize(product, n_hi, lo_bits, packed, symmetric, clip)


def search_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale of every row among 80 ranges with the smallest 2.4-norm error, in float64."""
    half = 2 ** (bits - 1)
    if weight.shape[-1] == 0:
        return weight.new_zeros(weight.shape[:-1], dtype=torch.float32)
    weight = weight.double()
    amax = weight.abs().amax(-1)
    best_error, best_scale = torch.full_like(amax, torch.inf), amax / (half - 1)
    for step in range(80):
        scale = (amax * (1 - 0.01 * step) / (half - 1)).unsqueeze(-1)
        codes = torch.round(weight / scale).clamp(-half, half - 1)
        error = (codes * scale - weight).abs().pow(2.4).sum(-1)
        best_scale = torch.where(error < best_error, scale[..., 0], best_scale)
        best_error = torch.minimum(error, best_error)
    return torch.where(amax == 0, 1.0, best_scale).float()


def gptq_block(
    targets: torch.Tensor,
    weight: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns [C, N] of a weight rounded one after another, in float64: codes, errors, exact."""
    half, errors = 2 ** (bits - 1), torch.zeros_like(weight, dtype=torch.float64)
    exact = torch.zeros_like(errors)
    for j, column in enumerate(targets.double()):
        exact[j] = (column + feedback[:j, j].double() @ errors[:j]) / scale.double()
        errors[j] = weight[j] - exact[j].clamp(-half, half - 1).round() * scale.double()
    codes = exact.clamp(-half, half - 1).round().to(torch.int8)
    return codes, errors.float(), exact.float()


def embedding(
    ids: torch.Tensor,
    codes_lo: torch.Tensor,
    codes_hi: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` of scale * code: one product in float32, rounded to `dtype`.

    Takes the unpacked codes (uint8 [N, K_lo / 2], int8 [N, K_hi]) instead of a packed weight.
    """
    scale_lo, scale_hi = weight_scale[ids].split(1, dim=-1)
    return torch.cat([scale_lo * unpack_int4(codes_lo[ids]), scale_hi * codes_hi[ids]], dim=-1).to(
        dtype
    )


def mixed_gemm(
    q_lo: torch.Tensor,
    q_hi: torch.Tensor,
    params: torch.Tensor,
    codes_lo: torch.Tensor,
    codes_hi: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The exact integer GEMM and the float32 epilogue, in the order of operations of every kernel.

    Formula: d_p = sum_k q_p[m, k] w_p[n, k] - zero_p[m] * sum_k w_p[n, k] as an exact integer;
    y = ((d_lo * s_lo[m]) * t_lo[n] + (d_hi * s_hi[m]) * t_hi[n]) + bias[n], each operation rounded
    to float32; a part without columns is skipped.
    Takes the unpacked codes (uint8 [N, K_lo / 2], int8 [N, K_hi]) instead of a packed weight.
    """
    q_lo = unpack_int4(q_lo) if q_lo.dtype == torch.uint8 else q_lo
    y = None
    for part, (q, w) in enumerate([(q_lo, unpack_int4(codes_lo)), (q_hi, codes_hi)]):
        if q.shape[-1] == 0:
            continue
        scale, zero = params[..., 2 * part, None], params[..., 2 * part + 1, None]
        exact = q.double() @ w.double().T - zero.double() * w.double().sum(1)
        term = (exact.float() * scale) * weight_scale[:, part]
        y = term if y is None else y + term
    if y is None:
        y = params.new_zeros(*q_lo.shape[:-1], codes_lo.shape[0])
    return (y if bias is None else y + bias.float()).to(out_dtype)
