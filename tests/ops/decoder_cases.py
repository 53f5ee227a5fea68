"""Decoder layers with random weights over pages: tests of decoder_layers on every device."""

from __future__ import annotations

from typing import Any

import torch
from kv_cases import cos_sin, rotations

from resq_kernels import kv_pages
from resq_kernels.formats import pack_int4, weight_sums
from resq_kernels.ops.decoder_layers import LAYER_WEIGHTS

PAGE = 32


class Case:
    """Random layers, sequences in their pages, and the arguments of a call.

    Args:
        lengths: tokens of each sequence before the pass.
        new: tokens of each sequence in the pass.
        dtype: of the hidden states.
        operators: of the device that weights are packed for.
        kinds: sizes and options that replace those below.
    """

    def __init__(
        self,
        lengths: list[int],
        new: list[int],
        dtype: torch.dtype = torch.float32,
        operators: Any = torch.ops.resq,
        **kinds: Any,
    ) -> None:
        self.operators = operators
        self.layers, self.hidden, self.intermediate = 3, 96, 160
        self.n_q, self.n_kv, self.head_dim, self.matrices = 4, 2, 64, 1
        self.n_hi, self.clip = [16, 32, 0], [0.9, 1.0, 0.95]
        self.lo_bits, self.symmetric, self.hi_bits = 4, False, 8
        self.hadamard, self.hadamard_block = True, 0
        self.gain = self.bias = True
        vars(self).update(kinds)
        self.dtype, self.tokens = dtype, sum(new)
        pages = [-(-(a + b) // PAGE) for a, b in zip(lengths, new, strict=True)]
        self.table = torch.full((len(new), max([1, *pages])), 1 << 30, dtype=torch.int32)
        order, at = torch.randperm(sum(pages) + 1).int(), 0
        slots = [torch.zeros(0, dtype=torch.int64)]
        for i, count in enumerate(pages):
            self.table[i, :count] = order[at : at + count]
            at += count
            place = torch.arange(lengths[i], lengths[i] + new[i])
            slots.append(self.table[i].long()[place // PAGE] * PAGE + place % PAGE)
        self.slots = torch.cat(slots)
        self.lens = torch.tensor([a + b for a, b in zip(lengths, new, strict=True)]).int()
        self.starts = torch.tensor([0, *torch.tensor(new).cumsum(0)]).int()
        shape = kv_pages.cache_shape(len(order), self.n_kv, PAGE, self.head_dim)
        # Earlier tokens are whatever these bytes say, but finite: scales and offsets are float16.
        self.caches = [torch.randint(0, 60, shape, dtype=torch.uint8) for _ in range(self.layers)]
        self.x = torch.randn(self.tokens, self.hidden).to(dtype)
        self.cos, self.sin = cos_sin(self.tokens, self.head_dim)
        self.weights = [weight for _ in range(self.layers) for weight in self.layer()]

    def layer(self) -> list[torch.Tensor | None]:
        attended = self.n_q * self.head_dim
        qkv = attended + 2 * self.n_kv * self.head_dim
        hidden, attention, intermediate = self.n_hi
        return [
            self.norm_gain(),
            *self.linear(qkv, self.hidden, hidden),
            rotations(self.matrices, self.head_dim).half() if self.matrices else None,
            *self.linear(self.hidden, attended, attention),
            self.norm_gain(),
            *self.linear(2 * self.intermediate, self.hidden, hidden),
            *self.linear(self.hidden, self.intermediate, intermediate),
        ]

    def norm_gain(self) -> torch.Tensor | None:
        return torch.rand(self.hidden).add(0.5).to(self.dtype) if self.gain else None

    def linear(self, n: int, k: int, k_hi: int) -> list[torch.Tensor | None]:
        lo = pack_int4(torch.randint(-8, 8, (n, k - k_hi), dtype=torch.int8))
        hi = torch.randint(-128, 128, (n, k_hi), dtype=torch.int8)
        scale = (0.5 + torch.rand(n, 2)) * k**-0.5 / torch.tensor([4.6, 73.9])
        bias = torch.randn(n).to(self.dtype) if self.bias else None
        return [self.operators.pack_weight(lo, hi).clone(), scale, weight_sums(lo, hi), bias]

    def arguments(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "cos": self.cos,
            "sin": self.sin,
            "caches": [cache.clone() for cache in self.caches],
            "slot_mapping": self.slots,
            "block_table": self.table,
            "seq_lens": self.lens,
            "query_starts": self.starts,
            "weights": self.weights,
            "eps": 1e-5,
            "scale": self.head_dim**-0.5,
            "n_hi": self.n_hi,
            "clip": self.clip,
            "lo_bits": self.lo_bits,
            "symmetric": self.symmetric,
            "hi_bits": self.hi_bits,
            "hadamard": self.hadamard,
            "hadamard_block": self.hadamard_block,
        }

    def one_by_one(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """What the operators give: out, residual, and the caches after them."""
        run, caches, x, residual = self.operators, [c.clone() for c in self.caches], self.x, None
        formats = [
            (n_hi, self.lo_bits, None, self.symmetric, clip)
            for n_hi, clip in zip(self.n_hi, self.clip, strict=True)
        ]
        for i, cache in enumerate(caches):
            own = self.weights[i * LAYER_WEIGHTS : (i + 1) * LAYER_WEIGHTS]
            qkv, o_proj, gate_up, down = own[1:5], own[6:10], own[11:15], own[15:19]

            *codes, added = run.rms_norm_quantize(x, residual, own[0], 1e-5, *formats[0])
            residual = x if residual is None else added
            joined = run.mixed_gemm(*codes, *qkv, self.dtype)
            heads = joined.unflatten(1, (-1, self.head_dim))
            q, k, v = heads.split([self.n_q, self.n_kv, self.n_kv], 1)
            rope = (self.cos, self.sin, own[5])
            q = run.kv_append(k, v, *rope, cache, self.slots, self.hi_bits, q)
            where = (cache, self.table, self.lens, self.starts, self.head_dim**-0.5, self.dtype)
            attended = run.kv_attention(q, *where, self.n_hi[1] // self.n_q)
            codes = run.mixed_quantize(attended, *formats[1])
            x = run.mixed_gemm(*codes, *o_proj, self.dtype)
            *codes, residual = run.rms_norm_quantize(x, residual, own[10], 1e-5, *formats[0])
            joined = run.mixed_gemm(*codes, *gate_up, self.dtype)
            block = self.hadamard_block
            codes = run.silu_mul_hadamard_quantize(joined, self.hadamard, *formats[2], block)
            x = run.mixed_gemm(*codes, *down, self.dtype)
        assert residual is not None
        return x, residual, caches

    def check(self) -> None:
        """One call gives the bits of the operators one by one."""
        arguments = self.arguments()
        out, residual = self.operators.decoder_layers(**arguments)
        expected, sums, caches = self.one_by_one()
        assert torch.isfinite(expected).all()
        pairs = zip((out, residual, *arguments["caches"]), (expected, sums, *caches), strict=True)
        for found, right in pairs:
            assert found.dtype == right.dtype
            assert torch.equal(found, right)

    def check_shared_pages(self) -> None:
        """Without earlier tokens layers may have the same pages; those of the last one stay."""
        expected = self.operators.decoder_layers(**self.arguments())
        shared = self.caches[-1].clone()
        arguments = {**self.arguments(), "caches": self.layers * [shared]}
        found = self.operators.decoder_layers(**arguments)
        right = (*expected, self.one_by_one()[2][-1])
        assert all(map(torch.equal, (*found, shared), right))


VARIANTS: dict[str, dict[str, Any]] = {
    "decode": {},
    "head_dim 128": {"head_dim": 128, "n_q": 3, "n_kv": 1, "n_hi": [16, 48, 0]},
    "a rotation for each kv head": {"matrices": 2},
    "no rotation, no gain, no bias": {"matrices": 0, "gain": False, "bias": False},
    "8-bit activations": {"lo_bits": 8},
    "uniform": {"n_hi": [0, 0, 0], "hi_bits": 4, "hadamard": False, "symmetric": True},
    "INT8 columns in down_proj": {"n_hi": [16, 32, 24]},
    "INT8 columns beside blocks": {"n_hi": [16, 32, 32], "hadamard_block": 64},
    "one layer": {"layers": 1},
}
