"""Every operator on a GPU has the results of the CPU's: real layer sizes, dtypes and forms."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    CHOSEN,
    DTYPES,
    HADAMARD_SIZES,
    OTHERS,
    Weight,
    activations,
    assert_codes_agree,
    cached,
    cpu_and_cuda,
    gemm_on_both,
    layers,
    on,
    same_bits,
)

from resq_kernels.bench.choices import forced
from resq_kernels.nn import prefill

BATCHES = (0, 1, 2, 7, 16, 33, 64, 65, 130, 257)


@pytest.mark.parametrize("model", [*CHOSEN, *OTHERS])
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


@pytest.mark.parametrize("rows", [3, 60, 130])
def test_mixed_gemm_has_the_same_bits_by_every_legal_choice(rows: int) -> None:
    """Every tile and split: also blocks of a cluster that share K, or a row of tiles."""
    n, k_lo, k_hi = 1100, 960, 192
    inputs, bias = activations(rows, k_lo, k_hi, "bytes"), torch.randn(n).half()
    expected, chosen = gemm_on_both(weight := Weight(n, k_lo, k_hi), inputs, bias, torch.float16)
    assert same_bits(chosen, expected)
    arguments = on("cuda", (*inputs, *weight.arguments("cuda"), bias))
    for choice in torch.ops.resq.mixed_gemm_choices(rows, n, k_lo, k_hi, False, 0):
        with forced("mixed_gemm", choice):
            result = torch.ops.resq.mixed_gemm(*arguments, torch.float16).cpu()
        assert same_bits(result, expected), choice


def test_mixed_gemm_s_rows_do_not_depend_on_the_batch() -> None:
    weight = Weight(4096, 3584, 512)
    packed = weight.arguments("cuda")
    rows = on("cuda", activations(4096, 3584, 512))
    everything = torch.ops.resq.mixed_gemm(*rows, *packed, None, torch.float16)
    for first, count in ((0, 1), (100, 3), (4000, 64), (1000, 65), (17, 700)):
        part = tuple(t[first : first + count].clone() for t in rows)
        alone = torch.ops.resq.mixed_gemm(*part, *packed, None, torch.float16)
        assert torch.equal(alone, everything[first : first + count]), (first, count)


def test_mixed_gemm_returns_nan_for_a_row_that_is_not_finite() -> None:
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
@pytest.mark.parametrize("n, k_lo, k_hi", [(70, 208, 40), (320, 0, 128), (128256, 0, 2048)])
def test_embedding_has_the_cpu_s_bits(n: int, k_lo: int, k_hi: int, dtype: torch.dtype) -> None:
    weight, ids = Weight(n, k_lo, k_hi), torch.randint(0, n, (3, 50))
    expected, result = (
        torch.ops.resq.embedding(
            ids.to(device), *weight.arguments(device)[:2], k_lo, k_hi, dtype
        ).cpu()
        for device in ("cpu", "cuda")
    )
    assert same_bits(result, expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("columns, rows", [(1, 1), (7, 129), (32, 4096), (32, 28672)])
def test_gptq_block_has_the_cpu_s_bits(columns: int, rows: int) -> None:
    weight, noise = torch.randn(2, columns, rows)
    feedback, scale = torch.randn(columns, columns) / columns**0.5, 0.1 + torch.rand(rows)
    for bits in (4, 8):
        given = (weight + 0.1 * noise, weight, feedback, scale, bits)
        expected, result = cpu_and_cuda("gptq_block", *given)
        assert all(map(same_bits, result, expected))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, k", [(3, 1), (70, 250), (4096, 3584), (9, 28672)])
def test_search_scale_has_the_cpu_s_bits(rows: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.distributions.StudentT(3.0).sample((rows, k)).to(dtype)
    weight[0], weight[1, k // 2] = 0, float("nan")
    for bits in (4, 8):
        expected, result = cpu_and_cuda("search_scale", weight, bits)
        assert same_bits(result, expected)


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


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, k", [(3, 8), (5, 37), (65, 896), (9, 5120), (33, 8192), (2, 16384)])
def test_rms_norm(rows: int, k: int, dtype: torch.dtype) -> None:
    x, gain = torch.randn(rows, k).to(dtype), torch.rand(k)
    for weight in (None, gain, gain.to(dtype)):
        expected, result = cpu_and_cuda("rms_norm", x, weight, 1e-5)
        assert same_bits(result, expected)


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
    for n_hi, lo_bits, packed, block in (
        (64, 4, True, 128),
        (192, 8, False, 256),
        (0, 4, True, 64),
    ):
        options = (True, n_hi, lo_bits, packed, False, 0.9, block)
        expected, result = cpu_and_cuda("silu_mul_hadamard_quantize", gate_up, *options)
        assert all(map(same_bits, result, expected)), block


# (columns, INT8 columns of them) of down_proj: Llama-3-8B, 3.2-1B, Qwen2.5-7B, 72B, SmolLM2-135M
BLOCKS = [(14336, 1792), (8192, 1024), (18944, 2560), (29568, 3712), (1536, 256)]


@pytest.mark.parametrize(("n", "n_hi"), BLOCKS)
def test_silu_mul_hadamard_quantize_in_blocks(n: int, n_hi: int) -> None:
    for rows in (1, 20, 70):  # in clusters of eight blocks, of fewer, and in none
        gate_up = torch.randn(rows, 2 * n).bfloat16()
        options = (True, n_hi, 4, True, False, 0.9, 256)
        expected, result = cpu_and_cuda("silu_mul_hadamard_quantize", gate_up, *options)
        assert all(map(same_bits, result, expected)), rows


# (q heads, kv heads, head dim)
HEADS = [(32, 8, 128), (28, 4, 128), (64, 8, 128), (32, 8, 64), (14, 2, 64)]


@pytest.mark.sanitizer
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_append_writes_the_cpu_s_bytes(dtype: torch.dtype, heads: tuple) -> None:
    for lengths in ([1], [3, 130, 64], [700, 5]):
        append, cache, slots, _ = cached(lengths, heads, 64, dtype)
        for hi_bits in (8, 4):
            expected, result = cache.clone(), cache.cuda()
            torch.ops.resq.kv_append(*append, expected, slots, hi_bits)
            torch.ops.resq.kv_append(*on("cuda", append), result, slots.cuda(), hi_bits)
            assert torch.equal(result.cpu(), expected), (lengths, hi_bits)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_append_rotates_queries(dtype: torch.dtype, heads: tuple) -> None:
    lengths, (n_q, _, head_dim) = [3, 130, 64], heads
    append, cache, slots, table = cached(lengths, heads, 64, dtype)
    q = torch.randn(sum(lengths), n_q, head_dim).to(dtype)
    expected = torch.ops.resq.kv_append(*append, cache.clone(), slots, 8, q)
    pages, on_gpu = cache.cuda(), on("cuda", (*append, q))
    got = torch.ops.resq.kv_append(*on_gpu[:-1], pages, slots.cuda(), 8, on_gpu[-1])
    bound = 2 * head_dim * 2.0**-24 * q.float().norm(dim=-1, keepdim=True)
    assert ((got.cpu() - expected).abs() <= bound).all()
    # And the attention that they are for: 4-bit rounding moves a row by 10 % of its norm; the
    # kernels may differ by 2 % of that.
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    where = (pages.cpu(), table, torch.tensor(lengths).int(), starts)
    attention = torch.ops.resq.kv_attention
    expected = attention(expected, *where, 0.1)
    result = attention(got, *on("cuda", where), 0.1).cpu()
    error = (result - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    assert error.max() < 2e-3


@pytest.mark.sanitizer
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_dequantize_has_the_cpu_s_bits(dtype: torch.dtype, heads: tuple) -> None:
    for lengths in ([1], [3, 130, 64], [700, 5]):
        append, cache, slots, table = cached(lengths, heads, 64, torch.float32)
        torch.ops.resq.kv_append(*append, cache, slots)
        lens = torch.tensor(lengths, dtype=torch.int32)
        where = (cache, table, lens)
        for most in (max(lengths), max(lengths) + 3):
            expected = torch.ops.resq.kv_dequantize(*where, most, heads[2], dtype)
            result = torch.ops.resq.kv_dequantize(*on("cuda", where), most, heads[2], dtype)
            for here, there in zip(expected, result, strict=True):
                assert same_bits(there.cpu(), here), (lengths, most)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_agrees_with_the_cpu_s_kv_attention(heads: tuple) -> None:
    lengths, counts = [200, 200, 1500, 66, 90], [200, 200, 130, 1, 0]
    append, cache, slots, table = cached(lengths, heads, 64, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), heads[0], heads[2])
    scale = heads[2] ** -0.5
    expected = torch.ops.resq.kv_attention(q, cache, table, lens, starts, scale)
    where = on("cuda", (q, cache, table, lens))
    result = prefill.attend(*where, list(zip(counts, lengths, strict=True)), scale)
    assert result.dtype == torch.float16
    # float16 rounds q, K, V and the weights by 2^-11 each; the CPU's operator runs at 2^-16.
    error = (result.float().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    assert error.max() < 4 * 2**-11
    whole = where[0][200:400], where[1], where[2][1:2], where[3][1:2]
    parts = [prefill.attend(whole[0][:90], *whole[1:3], whole[3] - 110, [(90, 90)], scale)]
    parts += [prefill.attend(whole[0][90:], *whole[1:], [(110, 200)], scale)]
    error = (torch.cat(parts).float().cpu() - expected[200:400]).norm(dim=-1)
    assert (error < 4 * 2**-11 * expected[200:400].norm(dim=-1)).all()


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_kv_attention_agrees_with_the_cpu_s(heads: tuple, page_size: int) -> None:
    lengths = [1, 40, 2500, 300, 1024]
    append, cache, slots, table = cached(lengths, heads, page_size, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    lens = torch.tensor(lengths, dtype=torch.int32)
    for counts in ([1, 1, 1, 1, 1], [1, 3, 8, 2, 5], [1, 40, 17, 300, 64]):
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        q = torch.randn(sum(counts) + 1, heads[0], heads[2])
        args = (q, cache, table, lens, starts, heads[2] ** -0.5)
        expected, result = cpu_and_cuda("kv_attention", *args)
        # 4-bit rounding moves a row by 10 % of its norm; the kernels may differ by 2 % of that.
        error = (result - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
        assert error.max() < 2e-3, counts
        alone = on("cuda", (q[1:2], cache, table[1:2], lens[1:2]))
        if counts[1] == 1:
            one = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
            again = torch.ops.resq.kv_attention(*alone, one, heads[2] ** -0.5)
            assert same_bits(again.cpu(), result[1:2])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_attention_of_a_slice_in_every_output_dtype(dtype: torch.dtype, heads: tuple) -> None:
    lengths, (n_q, _, head_dim) = [1100, 70], heads
    append, cache, slots, table = cached(lengths, heads, 64, torch.float32)
    torch.ops.resq.kv_append(*append, cache, slots)
    where = on("cuda", (cache, table, torch.tensor(lengths).int(), torch.tensor([0, 2, 5]).int()))
    q = torch.randn(5, n_q + 3, head_dim, device="cuda").to(dtype)[:, 2:-1]
    attention = torch.ops.resq.kv_attention
    exact = attention(q.float(), *where, 0.1)
    for out_dtype in DTYPES:
        out = attention(q, *where, 0.1, out_dtype=out_dtype)
        assert same_bits(out.cpu(), exact.to(out_dtype).cpu())
