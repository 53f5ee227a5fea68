"""The CUDA operators agree with the fakes that torch.compile uses, under the emulator."""

from __future__ import annotations

import emulation
import pytest
import torch
from kv_cases import cos_sin, fill_pages, rotations

from resq_kernels import kv_pages
from resq_kernels.formats import pack_int4, weight_sums

ROWS, K, HIGH, N, WIDE = 3, 512, 64, 70, 448


@pytest.fixture(autouse=True)
def fakes(sm90: emulation.Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own fakes, for the emulated operators; CPU tensors stand for CUDA ones."""
    registered = torch._library.simple_registry.singleton
    for name in SAMPLES:
        entry = registered.find(f"{emulation.NAMESPACE}::{name}")
        if entry.fake_impl.kernel is None:
            fake = registered.find(f"resq::{name}").fake_impl.kernel.func
            torch.library.register_fake(f"{emulation.NAMESPACE}::{name}")(fake)


def gemm_arguments(device: emulation.Emulated) -> tuple:
    codes = (
        pack_int4(torch.randint(-8, 8, (N, K - HIGH), dtype=torch.int8)),
        torch.randint(-128, 128, (N, HIGH), dtype=torch.int8),
    )
    return (
        torch.randint(0, 256, (ROWS, (K - HIGH) // 2), dtype=torch.uint8),
        torch.randint(-128, 128, (ROWS, HIGH), dtype=torch.int8),
        torch.ones(ROWS, 4),
        device.pack_weight(*codes).clone(),
        torch.ones(N, 2),
        weight_sums(*codes),
        None,
        torch.bfloat16,
    )


def append_arguments(_: emulation.Emulated) -> tuple:
    rows, cache = torch.randn(2, ROWS, 2, 64), torch.zeros(kv_pages.cache_shape(1, 2, 32, 64))
    rope = (*cos_sin(ROWS, 64), rotations(1, 64))
    return (*rows, *rope, cache.byte(), torch.arange(ROWS), 8, torch.randn(ROWS, 4, 64))


def attention_arguments(_: emulation.Emulated) -> tuple:
    pages = fill_pages([torch.randn(40, 1, 64)], [torch.randn(40, 1, 64)], 32)
    starts = torch.tensor([0, ROWS], dtype=torch.int32)
    where = (pages.cache, pages.block_table, pages.seq_lens, starts)
    return (torch.randn(ROWS, 4, 64).half(), *where, 0.1, torch.float32)


def dequantize_arguments(_: emulation.Emulated) -> tuple:
    pages = fill_pages([torch.randn(40, 1, 64)], [torch.randn(40, 1, 64)], 32)
    return (pages.cache, pages.block_table, pages.seq_lens, 45, 64, torch.float16)


def embedding_arguments(device: emulation.Emulated) -> tuple:
    codes = torch.zeros(N, 0, dtype=torch.uint8), torch.ones(N, 64, dtype=torch.int8)
    packed = device.pack_weight(*codes).clone()
    return (torch.randint(0, N, (ROWS, 2)), packed, torch.ones(N, 2), 0, 64, torch.bfloat16)


# operator -> its arguments; `packed` is given, because its default depends on the device.
SAMPLES = {
    "search_scale": lambda _: (torch.randn(ROWS, K), 4),
    "gptq_block": lambda _: (*torch.randn(2, 9, K), torch.randn(9, 9), torch.ones(K), 4),
    "mixed_quantize": lambda _: (torch.randn(ROWS, K), HIGH, 4, True),
    "rms_norm_quantize": lambda _: (
        torch.randn(2, ROWS, K).half(),
        torch.randn(2, ROWS, K).half(),
        torch.ones(K),
        1e-5,
        HIGH,
        4,
        False,
    ),
    "rms_norm": lambda _: (torch.randn(2, ROWS, K).half(), torch.ones(K), 1e-5),
    "silu_mul_hadamard_quantize": lambda _: (torch.randn(ROWS, 2 * WIDE), True, 0, 4, True),
    "hadamard": lambda _: (torch.randn(2, ROWS, WIDE).bfloat16(),),
    "embedding": embedding_arguments,
    "mixed_gemm": gemm_arguments,
    "kv_append": append_arguments,
    "kv_attention": attention_arguments,
    "kv_dequantize": dequantize_arguments,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str, sm90: emulation.Emulated) -> None:
    arguments = SAMPLES[name](sm90)
    operator = getattr(getattr(torch.ops, emulation.NAMESPACE), name).default
    emulation.runtime().emulated_set_device(sm90.index)
    with emulation.emulator().options(arch=90):
        torch.library.opcheck(operator, arguments)
        emulation.emulator().check()


@pytest.mark.parametrize(
    "name", [name for name in SAMPLES if not name.startswith(("kv_", "gptq_"))]
)
def test_empty_batches_launch_nothing(name: str, device: emulation.Emulated) -> None:
    arguments = SAMPLES[name](device)
    count = 3 if name == "mixed_gemm" else 2 if name == "rms_norm_quantize" else 1
    empty = [t[:0] for t in arguments[:count]]
    result = getattr(device, name)(*empty, *arguments[count:])
    tensors = [result] if isinstance(result, torch.Tensor) else result
    assert all(t.shape[0] == 0 for t in tensors)


def test_quantizers_choose_the_form_that_the_family_multiplies_fastest(
    sm80: emulation.Emulated, sm90: emulation.Emulated
) -> None:
    x = torch.randn(ROWS, K)
    assert sm80.mixed_quantize(x, HIGH)[0].dtype == torch.uint8
    assert sm90.mixed_quantize(x, HIGH)[0].dtype == torch.int8
    assert sm80.mixed_quantize(x, HIGH, 8)[0].dtype == torch.int8
