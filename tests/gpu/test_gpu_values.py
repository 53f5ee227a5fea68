"""Every operator on a GPU has the results of the CPU's: real layer sizes, dtypes and forms."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DTYPES,
    HADAMARD_SIZES,
    MODELS,
    Weight,
    activations,
    assert_codes_agree,
    cpu_and_cuda,
    layers,
    on,
    same_bits,
)

BATCHES = (0, 1, 2, 7, 16, 33, 64, 65, 130, 257)


def gemm_on_both(
    weight: Weight, rows: tuple, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple:
    mixed_gemm = torch.ops.resq.mixed_gemm
    expected = mixed_gemm(*rows, *weight.arguments("cpu"), bias, dtype)
    return expected, mixed_gemm(*on("cuda", (*rows, *weight.arguments("cuda"), bias)), dtype).cpu()


@pytest.mark.parametrize("model", MODELS)
def test_mixed_gemm_has_the_cpu_s_bits_at_every_layer_size(model: str) -> None:
    for layer, n, k_lo, k_hi in layers(model):
        weight = Weight(n, k_lo, k_hi)
        for rows, form in ((1, "packed"), (16, "bytes"), (257, "packed"), (257, "8 bits")):
            inputs = activations(rows, k_lo, k_hi, form)
            expected, result = gemm_on_both(weight, inputs, None, torch.bfloat16)
            assert same_bits(result, expected), (layer, rows, form)


@pytest.mark.sanitizer
@pytest.mark.parametrize("form", ["packed", "bytes", "8 bits"])
@pytest.mark.parametrize("n, k_lo, k_hi", [(1, 2, 0), (70, 208, 40), (96, 0, 24), (200, 960, 128)])
def test_mixed_gemm_at_every_batch_size_dtype_and_form(
    n: int, k_lo: int, k_hi: int, form: str
) -> None:
    weight = Weight(n, k_lo, k_hi)
    for index, rows in enumerate(BATCHES):
        dtype, bias_dtype = DTYPES[index % 3], (*DTYPES, None)[index % 4]
        bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
        inputs = activations(rows, k_lo, k_hi, form)
        expected, result = gemm_on_both(weight, inputs, bias, dtype)
        assert same_bits(result, expected), (rows, dtype, bias_dtype)


def test_mixed_gemm_s_rows_do_not_depend_on_the_batch() -> None:
    weight = Weight(4096, 3584, 512)
    packed = weight.arguments("cuda")
    rows = on("cuda", activations(4096, 3584, 512))
    everything = torch.ops.resq.mixed_gemm(*rows, *packed, None, torch.float16)
    for first, count in ((0, 1), (100, 3), (4000, 64), (1000, 65), (17, 700)):
        part = tuple(t[first : first + count].clone() for t in rows)
        alone = torch.ops.resq.mixed_gemm(*part, *packed, None, torch.float16)
        assert torch.equal(alone, everything[first : first + count]), (first, count)


def test_mixed_gemm_answers_nan_for_a_row_that_is_not_finite() -> None:
    weight, rows = Weight(64, 448, 64), activations(130, 448, 64)
    rows[2][5, 0] = float("nan")
    _, result = gemm_on_both(weight, rows, None, torch.float32)
    assert result[5].isnan().all() and not result[4].isnan().any()


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "n, k_lo, k_hi", [(1, 2, 0), (70, 208, 40), (33, 0, 24), (4096, 3584, 512)]
)
def test_unpack_weight_inverts_pack_weight(n: int, k_lo: int, k_hi: int) -> None:
    weight = Weight(n, k_lo, k_hi)
    packed = torch.ops.resq.pack_weight(*on("cuda", weight.codes))
    back = torch.ops.resq.unpack_weight(packed, n, k_lo, k_hi)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(back, weight.codes, strict=True))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, n_hi", [(3, 1, 0), (5, 250, 30), (130, 4096, 512), (7, 8192, 1024)]
)
def test_mixed_quantize_has_the_cpu_s_bits(
    rows: int, k: int, n_hi: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(rows, k) * 10 ** torch.empty(rows, 1).uniform_(-6, 4)).to(dtype)
    x[0], x[-1, k // 2] = 0, float("inf")
    for lo_bits, packed, symmetric, clip in (
        (4, False, False, 1.0),
        (4, True, True, 0.9),
        (8, False, False, 1.0),
    ):
        if packed and (k - n_hi) % 2:
            continue
        expected, result = cpu_and_cuda("mixed_quantize", x, n_hi, lo_bits, packed, symmetric, clip)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, n_hi", [(3, 8, 2), (65, 896, 112), (9, 5120, 640), (33, 8192, 1024)]
)
def test_rms_norm_quantize(rows: int, k: int, n_hi: int, dtype: torch.dtype) -> None:
    x, residual, gain = (
        torch.randn(rows, k).to(dtype),
        torch.randn(rows, k).to(dtype),
        torch.rand(k),
    )
    for args in ((x, residual, None), (x, None, gain), (x, residual, gain.to(dtype))):
        expected, result = cpu_and_cuda("rms_norm_quantize", *args, 1e-5, n_hi, 4, False)
        assert_codes_agree(result, expected)
        assert same_bits(result[3], expected[3])


@pytest.mark.parametrize("n", HADAMARD_SIZES)
def test_hadamard_at_every_mlp_width_and_shard(n: int) -> None:
    for shard in (1, 2, 4, 8):
        x = torch.randn(3, n // shard)
        expected, result = cpu_and_cuda("hadamard", x)
        assert (result - expected).norm() / expected.norm() < 1e-6, shard


@pytest.mark.sanitizer
def test_hadamard_in_every_dtype() -> None:
    for dtype in DTYPES:
        x = torch.randn(5, 896).to(dtype)
        expected, result = cpu_and_cuda("hadamard", x, 2.0)
        step = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        assert ((result - expected).abs() <= step * expected.abs().clamp_min(1.0)).all()


@pytest.mark.parametrize("n", HADAMARD_SIZES)
def test_silu_mul_hadamard_quantize_at_every_mlp_width(n: int) -> None:
    gate_up = torch.randn(9, 2 * n)
    gate_up[0, :: n // 5] *= 1e3  # outliers of SwiGLU
    expected, result = cpu_and_cuda("silu_mul_hadamard_quantize", gate_up, True, 0, 4, False)
    assert_codes_agree(result, expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_hadamard_quantize_in_every_dtype_and_form(dtype: torch.dtype) -> None:
    gate_up = torch.randn(6, 2 * 448).to(dtype)
    for hadamard, n_hi, lo_bits, packed in (
        (True, 0, 4, True),
        (False, 56, 4, False),
        (True, 0, 8, False),
    ):
        expected, result = cpu_and_cuda(
            "silu_mul_hadamard_quantize", gate_up, hadamard, n_hi, lo_bits, packed
        )
        assert_codes_agree(result, expected)
