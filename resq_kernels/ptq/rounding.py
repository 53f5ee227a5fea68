"""Keys and values as the 4-bit cache returns them (docs/formats.md section 5)."""

from __future__ import annotations

import torch

from resq_kernels.config import ResQConfig


def round_cache(x: torch.Tensor, config: ResQConfig) -> torch.Tensor:
    """Quantizes and dequantizes [..., head_dim] per token and head: 7/8 INT4, 1/8 INT8.

    Methods without a high part store 4-bit codes in both.
    """
    high = x.shape[-1] // 8
    parts = x[..., :-high], x[..., -high:]
    bits = 4, 8 if config.method == "resq" else 4
    return torch.cat([_round_part(p, b) for p, b in zip(parts, bits, strict=True)], dim=-1)


def _round_part(x: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    offset = low.half().float()
    codes = torch.round((x - offset) / scale.clamp_min(2.0**-24)).clamp(0, 2**bits - 1)
    return scale * codes + offset
