"""`resq bench`: documented keys, results that are checked before they are timed, usage errors."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Result

from resq_kernels import ops
from resq_kernels.bench import device, layer, models

MACHINE_KEYS = {"date", "processor", "threads", "isa", "torch", "commit", "device", "clock"}
FIGURES = {"command", "machine", "machine_after", "peaks", "missing", "rows"}
FIGURES |= {"failures", "complete"}
ROW_KEYS = {
    "op",
    "kernel",
    "model",
    "layer",
    "batch",
    "shape",
    "ours_us",
    "ours_best_us",
    "ours_tflops",
    "ours_gb_per_s",
    "baseline",
    "baseline_us",
    "baseline_best_us",
    "ratio",
    "memory_bound_us",
    "compute_bound_us",
    "ceiling_share",
    "checked",
}
HIDDEN, WIDE, HEADS = 256, 192, (4, 2, 64)
BENCHES = {
    "gemm": ("--batch", "1,3"),
    "quantize": ("--batch", "1,3"),
    "hadamard": ("--batch", "1,3"),
    "attention": ("--batch", "1,2", "--context", "70"),
    "prefill": ("--batch", "1,2", "--context", "70"),
    "layer": ("--batch", "1,2", "--context", "7"),
    "model": ("--batch", "1,2", "--context", "7", "--layers", "2"),
    "latency": ("--batch", "1,2", "--context", "70"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model under a known name, and peaks that need neither a compiler nor time."""
    sizes = ("llama", HIDDEN, WIDE, 2, 4, 2, 320, False)
    monkeypatch.setitem(models.SIZES, "llama-3-8b", sizes)
    monkeypatch.setattr(device.int_rate, "integer_rate", lambda threads: 1e11)
    for peak in ("read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(device.timing, peak, lambda clock: 1e10)


@pytest.fixture
def figures(tmp_path: Path, resq: Callable[..., Result]) -> Callable[[str], dict[str, Any]]:
    """Runs one benchmark of the tiny model and returns its JSON, whose form is checked."""

    def run(name: str) -> dict[str, Any]:
        target = tmp_path / f"{name}.json"
        options = ("--shapes", "Llama-3-8B", "--rounds", 1, "--cold-mb", 0, "--json", target)
        result = resq("bench", name, *BENCHES[name], *options, "--threads", 1, "--cpu-time")
        assert result.code == 0, result.err
        found = json.loads(target.read_text())
        assert set(found) == FIGURES
        assert set(found["machine"]) >= MACHINE_KEYS
        assert found["machine"]["clock"] == "thread processor time"
        assert found["command"].startswith(f"resq bench {name} --batch 1,")
        assert len(result.out.splitlines()) == 1 + len(found["rows"]) + len(found["missing"])
        for row in found["rows"]:
            assert set(row) >= ROW_KEYS
            assert row["checked"] is True
            assert row["kernel"] == torch.ops.resq.cpu_isa()
            quotient = row["baseline_us"] / row["ours_us"]
            assert row["ratio"] == pytest.approx(quotient, abs=2e-3, rel=1e-2)
            bound = max(row["memory_bound_us"], row["compute_bound_us"] or 0)
            assert row["ceiling_share"] == pytest.approx(bound / row["ours_us"], abs=2e-3, rel=0.1)
        return found

    return run


def test_gemm(figures: Callable[[str], dict[str, Any]]) -> None:
    found = figures("gemm")
    # F.linear in two dtypes and int4 weights, whose groups of 128 columns down_proj does not have.
    assert len(found["rows"]) == 2 * (4 * 3 - 1)
    assert found["missing"] == {"torch int4 g128": "takes columns in groups of 128, got 192"}
    shapes = {row["layer"]: row["shape"][1:] for row in found["rows"]}
    assert shapes == {
        "qkv": [512, 256],
        "o": [256, 256],
        "gate_up": [384, 256],
        "down": [256, 192],
    }
    for row in found["rows"]:
        m, n, k = row["shape"]
        k_hi = row["k_hi"]
        assert k_hi == (32 if row["layer"] == "down" else k // 8)
        moved = n * ((k - k_hi) // 2 + k_hi + 16) + m * (k + 16 + 2 * n)
        assert row["memory_bound_us"] == round(moved / 1e4, 2)
        assert row["compute_bound_us"] == round(m * n * k / 1e5, 2)
        rate = 2 * m * n * k / row["ours_us"] / 1e6
        assert row["ours_tflops"] == pytest.approx(rate, abs=1e-3, rel=1e-2)


def test_quantize(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("quantize")["rows"]
    assert [row["op"] for row in rows[::2]] == [
        "mixed_quantize",
        "rms_norm_quantize",
        "silu_mul_hadamard_quantize",
    ]
    codes = HIDDEN + 16
    moved = {
        "o": 2 * HIDDEN + codes,
        "qkv": 6 * HIDDEN + codes,  # x and residual in, the new residual out
        "down": 4 * WIDE + WIDE + 16,
    }
    for row in rows:
        assert row["memory_bound_us"] == round(row["batch"] * moved[row["layer"]] / 1e4, 2)
        assert (row["baseline"], row["compute_bound_us"]) == ("torch", None)


def test_hadamard(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("hadamard")["rows"]
    assert [row["baseline"] for row in rows[:2]] == ["torch matmul bf16", "torch matmul fp32"]
    for row in rows:
        assert row["shape"] == [row["batch"], WIDE]
        assert row["memory_bound_us"] == round(row["batch"] * 4 * WIDE / 1e4, 2)


def test_attention(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("attention")["rows"]
    assert len(rows) == 2 * 4  # sequences x baselines
    for row in rows:
        assert row["shape"] == [row["batch"], 70, *HEADS]
        assert row["memory_bound_us"] == round(row["batch"] * 70 * 2 * 88 / 1e4, 2)


def test_prefill(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("prefill")["rows"]
    steps = [32, 64, 70]
    assert [row["baseline"] for row in rows] == ["kv_attention", "SDPA bf16"] * 2 * len(steps)
    assert [row["shape"][1] for row in rows[::2]] == steps * 2
    for row in rows:
        new = row["shape"][1]
        assert row["shape"] == [row["batch"], new, 70, *HEADS]
        moved = row["batch"] * (70 * 176 + new * 4 * 64 * 6)
        assert row["memory_bound_us"] == round(moved / 1e4, 2)


def test_layer(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("layer")["rows"]
    places = [("prefill", 1), ("decode", 1), ("prefill", 2), ("decode", 2)]
    assert [(row["layer"], row["batch"]) for row in rows] == [(f"{k} 7", b) for k, b in places]
    products = 512 * 256 + 256 * 256 + 384 * 256 + 256 * 192
    high, low = 512 + 256 + 384, 256
    packed = high * (256 * 7 // 16 + 32) + low * (160 // 2 + 32) + (high + low) * 16
    weights = packed + 2 * HIDDEN * 2 + 64 * 64 * 2  # gains and the key rotation
    for row in rows:
        decodes = row["op"] == "layer_decode"
        tokens = row["batch"] * (1 if decodes else 7)
        assert row["baseline"] == "transformers bf16" and row["shape"] == [row["batch"], 7]
        assert row["compute_bound_us"] == round(tokens * products / 1e5, 2)
        cache = row["batch"] * (8 if decodes else 7) * 2 * 88
        moved = weights + cache + 2 * tokens * HIDDEN * 2
        assert row["memory_bound_us"] == round(moved / 1e4, 2)


def test_model(figures: Callable[[str], dict[str, Any]]) -> None:
    rows = figures("model")["rows"]
    assert [(row["op"], row["batch"]) for row in rows] == [
        ("model_prefill", 1),
        ("model_decode", 1),
        ("model_prefill", 2),
        ("model_decode", 2),
    ]
    vocab, layers = 320, 2
    # q/k/v, o, gate and up have an eighth of their columns in 8 bits; down those beside blocks.
    products = 512 * 256 + 256 * 256 + 384 * 256 + 256 * 192
    high, low = 512 + 256 + 384, 256
    packed = high * (256 * 7 // 16 + 32) + low * (160 // 2 + 32) + (high + low) * 16
    for row in rows:
        tokens = row["batch"] * (7 if row["op"] == "model_prefill" else 1)
        assert row["baseline"] == "transformers bf16" and row["layers"] == layers
        speed = tokens / row["ours_us"] * 1e6
        assert row["ours_tokens_per_s"] == pytest.approx(speed, rel=1e-3, abs=0.1)
        assert row["compute_bound_us"] == round(tokens * layers * products / 1e5, 2)
        norms, rope = (2 * layers + 1) * HIDDEN * 2, 2 * 32 * 4
        matrices = 2 * vocab * HIDDEN * 2
        cache = row["batch"] * layers * 2 * 7 * 2 * 64 * 2
        floats = matrices + norms + rope + layers * products * 2 + cache
        assert row["baseline_bytes"] == floats
        pages = row["batch"] * layers * 2 * 64 * 88  # one page of 64 tokens
        rotations = layers * 64 * 64 * 2
        matrix = vocab * (HIDDEN + 16)  # a byte a code, scales and sums of both parts
        # For callers and adapters, unread by a pass: U_A and g, then gains, key factors, U_B, and
        # factors and order of the intermediate channels.
        basis = HIDDEN * HIDDEN * 2 + HIDDEN * 2
        basis += layers * (2 * HIDDEN + 2 * 32 + 2 * 64 * 64 + 2 * 192) * 4
        ours = 2 * matrix + norms + rope + rotations + basis + layers * packed + pages
        assert row["ours_bytes"] == ours
        assert row["memory_bound_us"] == round((ours - matrix - basis) / 1e4, 2)


def moved_by(op: str, change: Callable[[Any], None]) -> Callable[..., Any]:
    """The operator with a result that `change` spoils in place."""
    right = getattr(ops, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        change(result)
        return result

    return wrong


def one_code(result: Any) -> None:
    result.q_hi.view(-1)[5] ^= 1


def scale(result: Any) -> None:
    result[0].params[0, 0] *= 1 + 1e-4


def residual(result: Any) -> None:
    result[1][0, 7] *= 1.01


def one_low_code(result: Any) -> None:
    result.q_lo.view(torch.int8).view(-1)[5] ^= 4


def one_value(result: Any) -> None:
    result.view(-1)[5] *= 1.01


def a_value(result: Any) -> None:
    result[1][0, 0, 0, 5] += 0.5


def a_head(result: Any) -> None:
    result[-1, 1] = result[-1, 0]


@pytest.mark.parametrize(
    ("name", "op", "change", "place", "timed_others"),
    [
        ("gemm", "mixed_gemm", one_value, "qkv 1x512x256", 0),
        ("quantize", "mixed_quantize", one_code, "1x256", 4),
        ("quantize", "rms_norm_quantize", scale, "1x256", 4),
        ("quantize", "rms_norm_quantize", residual, "1x256", 4),
        ("quantize", "silu_mul_hadamard_quantize", one_low_code, "1x384", 4),
        ("hadamard", "hadamard", one_value, "1x192", 0),
        ("attention", "kv_attention", a_head, "1x70", 0),
        ("prefill", "kv_dequantize", a_value, "1x32/70", 0),
        ("latency", "hadamard", one_value, "1", 10),
        ("latency", "kv_attention", a_head, "1", 10),
    ],
)
def test_a_kernel_that_is_wrong_is_not_timed(
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    op: str,
    change: Callable[[Any], None],
    place: str,
    timed_others: int,
) -> None:
    timed: list[object] = []
    right = device.BenchDevice.alternate

    def alternate(bench: Any, candidates: Any, **options: Any) -> Any:
        timed.append(candidates)
        return right(bench, candidates, **options)

    monkeypatch.setattr(device.BenchDevice, "alternate", alternate)
    monkeypatch.setattr(ops, op, moved_by(op, change))
    options = ("--shapes", "llama-3-8b", "--rounds", 1, "--cold-mb", 0, "--out", tmp_path / "x")
    result = resq("bench", name, *BENCHES[name], *options)
    assert result.code == 1
    what = "prefill" if name == "prefill" else op
    first = f"{what}: llama-3-8b {place}: differs from the reference"
    assert result.sentence.split("; ")[0] == first
    assert len(timed) == timed_others
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["complete"] and found["failures"] == result.sentence.split("; ")
    assert len(found["rows"]) >= timed_others
    assert op not in {row["op"] for row in found["rows"]}


@pytest.mark.parametrize("name", ["layer", "model"])
@pytest.mark.parametrize(
    ("queries", "sentence"),
    [
        (140, "torch.float32: logits differ from the reference"),
        (18, "torch.bfloat16: "),
        (2, "a decode step differs"),
    ],
)
def test_a_model_that_is_wrong_is_not_timed(
    resq: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    queries: int,
    sentence: str,
) -> None:
    attention, layers = ops.kv_attention, ops.decoder_layers

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x * 1.05 if len(x) == queries else x

    def wrong(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(moved(q), *args, **kwargs)

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(ops, "kv_attention", wrong)
    monkeypatch.setattr(ops, "decoder_layers", lambda x, *args: layers(moved(x), *args))
    monkeypatch.setattr(device.BenchDevice, "alternate", untouched)
    result = resq("bench", name, *BENCHES[name], "--shapes", "llama-3-8b")
    assert result.code == 1
    assert result.sentence.startswith(f"{name}: llama-3-8b: {sentence}")


def test_a_layer_s_step_that_is_not_the_ordinary_one_is_not_timed(
    resq: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layer.prepared

    def earlier(cache: Any, batch: int, context: int) -> Any:
        return right(cache, batch, context - 1)

    monkeypatch.setattr(layer, "prepared", earlier)
    options = ("--shapes", "llama-3-8b", "--rounds", 1, "--cold-mb", 0)
    result = resq("bench", "layer", *BENCHES["layer"], *options)
    assert result.code == 1
    sentence = "layer: llama-3-8b decode 1x7: differs from an ordinary call"
    assert result.sentence.startswith(sentence) and "layer_prefill" in result.out


def test_out_writes_json_table_and_plot(resq: Callable[..., Result], tmp_path: Path) -> None:
    options = ("--shapes", "llama-3-8b", "--rounds", 1, "--cold-mb", 0, "--out", tmp_path / "g")
    result = resq("bench", "gemm", *BENCHES["gemm"], *options)
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.json", "g.md", "g.png"]
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    lines = (tmp_path / "g.md").read_text().splitlines()
    assert lines[0].startswith("`resq bench gemm --batch 1,3")
    table = [line.split(" | ") for line in lines if line.startswith("| mixed_gemm")]
    assert len(table) == 2 * 4
    ratios = {r["baseline"]: f"{r['ratio']:.2f}" for r in rows if r["shape"] == [3, 512, 256]}
    assert table[1][3:5] == ["[3, 512, 256]", torch.ops.resq.cpu_isa()]
    assert table[1][-3:] == [*list(ratios.values())[:-1], f"{list(ratios.values())[-1]} |"]
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_out_says_so_without_matplotlib(
    resq: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return right(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    options = ("--shapes", "llama-3-8b", "--rounds", 1, "--cold-mb", 0, "--out", tmp_path / "h")
    result = resq("bench", "hadamard", *options)
    assert result.code == 0
    assert f"no {tmp_path / 'h'}.png: matplotlib is not installed" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.json", "h.md"]


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("conv",), 2, "invalid choice: 'conv'"),
        (("--shapes", "llama-9"), 2, "expected one of square, llama-3.2-1b"),
        (("--batch", "1,x"), 2, "at least 1, got 'x'"),
        (("--rounds", "0"), 2, "at least 1, got '0'"),
        (("--device", "cpu", "--cpu-time", "--threads", "2"), 2, "add --threads 1"),
        (("attention", "--shapes", "square"), 2, "bench attention: --shapes: expected one of"),
        (("attention", "--context", "0"), 2, "at least 1, got '0'"),
        (("--out", "/no/such/folder/x"), 2, "--out: the folder /no/such/folder does not exist"),
    ],
)
def test_bench_refuses_wrong_options(
    resq: Callable[..., Result], options: tuple[str, ...], code: int, sentence: str
) -> None:
    result = resq("bench", *options)
    assert (result.code, sentence in result.sentence) == (code, True), result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_says_that_there_is_no_cuda_device(resq: Callable[..., Result]) -> None:
    result = resq("bench", "--device", "cuda")
    assert (result.code, "torch sees no CUDA device" in result.sentence) == (1, True)
