"""The first thing to run on a GPU: whether each operator is right at all, on tiny inputs.

One test an operator, each run in a process of its own (tools/gpu/steps.py), so that a kernel that
breaks the context says nothing about the others. Both forms of a kernel where it has several.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    Weight,
    activations,
    assert_codes_agree,
    cached,
    cpu_and_cuda,
    gemm_on_both,
    on,
    same_bits,
)

from resq_kernels.nn import prefill

pytestmark = pytest.mark.sanitizer
HEADS = (8, 2, 128)  # query heads, kv heads, head dimension
LENGTHS = [3, 70]


def test_pack_weight() -> None:
    weight = Weight(70, 208, 40)
    packed = torch.ops.resq.pack_weight(*on("cuda", weight.codes))
    back = torch.ops.resq.unpack_weight(packed, 70, 208, 40)
    assert all(same_bits(a.cpu(), b) for a, b in zip(back, weight.codes, strict=True))


def test_search_scale() -> None:
    for bits in (4, 8):
        expected, result = cpu_and_cuda("search_scale", torch.randn(9, 250), bits)
        assert same_bits(result, expected)


def test_gptq_block() -> None:
    given = (*torch.randn(2, 9, 50), torch.randn(9, 9), torch.full((50,), 0.3))
    for bits in (4, 8):
        expected, result = cpu_and_cuda("gptq_block", *given, bits)
        assert all(map(same_bits, result, expected))


def test_mixed_quantize() -> None:
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    for packed in (False, True):
        expected, result = cpu_and_cuda("mixed_quantize", x, 32, 4, packed, False, 1.0)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


def test_rms_norm_quantize() -> None:
    x, residual = torch.randn(2, 5, 256).bfloat16()
    expected, result = cpu_and_cuda("rms_norm_quantize", x, residual, None, 1e-5, 32, 4, False)
    assert_codes_agree(result, expected)
    assert same_bits(result[3], expected[3])


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 256).bfloat16(), torch.randn(256).bfloat16()
    expected, result = cpu_and_cuda("rms_norm", x, weight, 1e-5)
    assert same_bits(result, expected)


def test_hadamard() -> None:
    for n in (448, 768):  # one factor that is no power of two, and the tensor cores' 12
        expected, result = cpu_and_cuda("hadamard", torch.randn(3, n))
        assert (result - expected).norm() < 1e-6 * expected.norm(), n


def test_silu_mul_hadamard_quantize() -> None:
    gate_up = torch.randn(5, 2 * 448).bfloat16()
    expected, result = cpu_and_cuda("silu_mul_hadamard_quantize", gate_up, True, 0, 4, False)
    assert_codes_agree(result, expected)
    blocks = (True, 64, 4, False, False, 1.0, 128)
    expected, result = cpu_and_cuda("silu_mul_hadamard_quantize", gate_up, *blocks)
    assert all(map(same_bits, result, expected))


@pytest.mark.parametrize("rows", [3, 130])  # small_m, and the family's kernel for many rows
def test_mixed_gemm(rows: int) -> None:
    weight, inputs = Weight(200, 448, 64), activations(rows, 448, 64, "bytes")
    expected, result = gemm_on_both(weight, inputs, torch.randn(200), torch.bfloat16)
    assert same_bits(result, expected)


def test_embedding() -> None:
    weight, ids = Weight(70, 0, 128), torch.randint(0, 70, (9,))
    expected, result = (
        torch.ops.resq.embedding(
            ids.to(device), *weight.arguments(device)[:2], 0, 128, torch.bfloat16
        ).cpu()
        for device in ("cpu", "cuda")
    )
    assert same_bits(result, expected)


def test_kv_append() -> None:
    append, cache, slots, _ = cached(LENGTHS, HEADS, 64, torch.bfloat16)
    expected, result = cache.clone(), cache.cuda()
    torch.ops.resq.kv_append(*append, expected, slots)
    torch.ops.resq.kv_append(*on("cuda", append), result, slots.cuda())
    assert torch.equal(result.cpu(), expected)


def test_kv_attention() -> None:
    append, cache, slots, table = cached(LENGTHS, HEADS, 64, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    where = (cache, table, torch.tensor(LENGTHS).int(), torch.tensor([0, 1, 3]).int())
    expected, result = cpu_and_cuda("kv_attention", torch.randn(3, 8, 128), *where, 0.1)
    # 4-bit rounding moves a row by 10 % of its norm; the kernels may differ by 2 % of that.
    assert ((result - expected).norm(dim=-1) < 2e-3 * expected.norm(dim=-1)).all()


def test_kv_dequantize() -> None:
    append, cache, slots, table = cached(LENGTHS, HEADS, 64, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    where = (cache, table, torch.tensor(LENGTHS).int())
    expected, result = cpu_and_cuda("kv_dequantize", *where, 70, 128, torch.float16)
    assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


def test_prefill() -> None:
    append, cache, slots, table = cached(LENGTHS, HEADS, 64, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    lens, starts = torch.tensor(LENGTHS).int(), torch.tensor([0, 3, 73]).int()
    q = torch.randn(73, 8, 128)
    expected = torch.ops.resq.kv_attention(q, cache, table, lens, starts, 0.1)
    result = prefill.attend(*on("cuda", (q, cache, table, lens)), [(3, 3), (70, 70)], 0.1)
    # float16 rounds q, K, V and the weights by 2^-11 each; the CPU's operator runs at 2^-16.
    error = (result.float().cpu() - expected).norm(dim=-1)
    assert (error < 4 * 2**-11 * expected.norm(dim=-1)).all()
