"""CUDA graphs, streams, torch.compile, opcheck, errors and modules on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from gpu_cases import Weight, activations, on
from torch import nn

from resq_kernels import ResQLinear, kv_pages, ops
from resq_kernels.nn.mlp import ResQMLP

HIDDEN, HIGH, WIDE = 1024, 128, 3584


def append(x: torch.Tensor) -> torch.Tensor:
    """Pages with the rows [tokens, heads, 128] as keys and as values."""
    tokens = torch.arange(x.shape[0], device="cuda")
    shape = kv_pages.cache_shape(4, x.shape[1], 64, 128)
    cache = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    ops.kv_append(x, x, None, None, None, cache, tokens)
    return cache


def attend(x: torch.Tensor) -> torch.Tensor:
    """Two sequences of fixed rows in two pages each; x are the queries of the first."""
    cache = append(torch.arange(256 * 2 * 128, device="cuda").sin().view(256, 2, 128))
    table = torch.arange(4, device="cuda", dtype=torch.int32).view(2, 2)
    lengths = torch.full((2,), 120, device="cuda", dtype=torch.int32)
    starts = torch.arange(3, device="cuda", dtype=torch.int32).clamp(max=1) * x.shape[0]
    return ops.kv_attention(x, cache, table, lengths, starts.int(), 0.1)


def dequantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pages of one sequence with the rows of `x` stand for."""
    table = torch.arange(4, device="cuda", dtype=torch.int32)[None]
    lengths = torch.full((1,), x.shape[0], device="cuda", dtype=torch.int32)
    return ops.kv_dequantize(append(x), table, lengths, 250, 128, torch.float16)


def calls(rows: int) -> dict:
    """name -> (function of one float tensor, that tensor) for every operator with a CUDA kernel."""
    weight = Weight(768, HIDDEN - HIGH, HIGH).arguments("cuda")
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(rows, 2 * WIDE, device="cuda", dtype=torch.bfloat16)
    heads = torch.randn(rows, 8, 128, device="cuda", dtype=torch.bfloat16)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return ops.mixed_gemm(*ops.mixed_quantize(x, HIGH), *weight, None, torch.bfloat16)

    return {
        "mixed_quantize": (lambda x: tuple(ops.mixed_quantize(x, HIGH)), x),
        "rms_norm_quantize": (lambda x: ops.rms_norm_quantize(x, x, None, 1e-5, HIGH)[0][2], x),
        "rms_norm": (lambda x: ops.rms_norm(x, None, 1e-5), x),
        "silu_mul_hadamard_quantize": (lambda x: tuple(ops.silu_mul_hadamard_quantize(x)), gate_up),
        "hadamard": (ops.hadamard, gate_up),
        "mixed_gemm": (linear, x),
        "kv_append": (append, heads),
        "kv_attention": (attend, heads),
        "kv_dequantize": (dequantize, heads),
    }


NAMES = (
    "mixed_quantize",
    "rms_norm_quantize",
    "rms_norm",
    "silu_mul_hadamard_quantize",
    "hadamard",
    "mixed_gemm",
    "kv_append",
    "kv_attention",
    "kv_dequantize",
)


def tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def equal(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("rows", [1, 16, 200])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_follows_its_input(name: str, rows: int) -> None:
    function, x = calls(rows)[name]
    function(x)  # modules are loaded outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(result, function(x))


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_do_not_disturb_each_other(name: str) -> None:
    function, x = calls(48)[name]
    inputs = [torch.randn_like(x) for _ in range(2)]
    expected = [tuple(t.clone() for t in tensors(function(value))) for value in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(30):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(function(inputs[index]))
    torch.cuda.synchronize()
    for wanted, got in zip(expected, results, strict=True):
        assert all(equal(wanted, result) for result in got)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name: str) -> None:
    function, x = calls(24)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (24, 5):
        assert equal(compiled(x[:rows].clone()), function(x[:rows].clone()))


def test_compiles_with_inductor() -> None:
    function, x = calls(24)["mixed_gemm"]
    compiled = torch.compile(lambda x: function(x * 2) + 1, fullgraph=True)
    assert torch.allclose(compiled(x), function(x * 2) + 1, rtol=2**-6, atol=2**-6)


def test_opcheck() -> None:
    x = torch.randn(5, HIDDEN, device="cuda", dtype=torch.float16)
    gate_up = torch.randn(5, 2 * 448, device="cuda")
    weight = Weight(96, 448, 64)
    rows, tokens = on("cuda", activations(5, 448, 64)), torch.arange(5, device="cuda")
    samples = {
        "mixed_quantize": (x, HIGH),
        "rms_norm_quantize": (x, x.clone(), None, 1e-5, HIGH),
        "rms_norm": (x, x[0], 1e-5),
        "silu_mul_hadamard_quantize": (gate_up,),
        "hadamard": (gate_up,),
        "search_scale": (gate_up, 4),
        "gptq_block": (gate_up, gate_up + 1, gate_up[:, :5], gate_up[0].abs() + 1, 4),
        "pack_weight": on("cuda", weight.codes),
        "unpack_weight": (weight.arguments("cuda")[0], 96, 448, 64),
        "embedding": (tokens, *weight.arguments("cuda")[:2], 448, 64, torch.bfloat16),
        "mixed_gemm": (*rows, *weight.arguments("cuda"), None, torch.float16),
    }
    q = torch.randn(5, 8, 128, device="cuda")
    cache = append(q[:, :2].contiguous())
    table, length = tokens[None, :4].int(), tokens[4:].int() + 1
    samples["kv_append"] = (q, q, None, None, None, append(q), tokens)
    samples["kv_attention"] = (q, cache, table, length, tokens[:2].int() * 5, 0.1)
    for op, args in samples.items():
        torch.library.opcheck(getattr(torch.ops.resq, op).default, args)


@pytest.mark.skipif("RESQ_DRY_CUDA" in os.environ, reason="the CPU's operators run, on CPU tensors")
def test_errors_are_sentences_before_any_launch() -> None:
    weight = Weight(96, 448, 64)
    rows, packed = on("cuda", activations(5, 448, 64)), weight.arguments("cuda")
    gemm = torch.ops.resq.mixed_gemm
    with pytest.raises(RuntimeError, match="mixed_gemm: params: expected the device of"):
        gemm(rows[0], rows[1], rows[2].cpu(), *packed, None, torch.float16)
    shifted = torch.empty(rows[0].numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(
        rows[0]
    )
    with pytest.raises(RuntimeError, match="mixed_gemm: q_lo: expected memory aligned to 16 bytes"):
        gemm(shifted, *rows[1:], *packed, None, torch.float16)
    with pytest.raises(RuntimeError, match="mixed_gemm: q_hi: .*not contiguous"):
        wide = torch.cat([rows[1], rows[1]], dim=1)
        gemm(rows[0], wide[:, :64], rows[2], *packed, None, torch.float16)
    cpu_packed = weight.arguments("cpu")[0].cuda()
    with pytest.raises(RuntimeError, match="mixed_gemm: packed_weight: expected .* bytes"):
        gemm(*rows, cpu_packed, *packed[1:], None, torch.float16)
    torch.cuda.synchronize()  # nothing was launched that could fail


def test_linear_moves_between_devices() -> None:
    layer = ResQLinear.from_linear(nn.Linear(HIDDEN, 300), high_columns=HIGH)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(7, HIDDEN)
    expected = layer(x)
    layer.cuda()
    assert torch.equal(layer(x.cuda()).cpu(), expected)
    assert all(torch.equal(value.cpu(), state[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.cpu()(x), expected)


def test_mlp_agrees_with_the_cpu_s() -> None:
    def linear(n: int, k: int, high: int) -> ResQLinear:
        return ResQLinear.from_linear(nn.Linear(k, n, bias=False), high_columns=high)

    mlp = ResQMLP(
        linear(WIDE, HIDDEN, HIGH),
        linear(WIDE, HIDDEN, HIGH),
        linear(HIDDEN, WIDE, 0),
        hadamard=True,
    )
    x = torch.randn(9, HIDDEN)
    expected = mlp(x)
    result = mlp.cuda()(x.cuda()).cpu()
    # A few codes fall on the other side of a rounding edge: 2 % of the output's norm is far above
    # what those move it, and far below what one wrong column would.
    assert (result - expected).norm() / expected.norm() < 0.02
