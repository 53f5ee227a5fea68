"""What all launches share: contexts, errors, shared memory, what is asked of a device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulation import NAMESPACE, Emulated, emulator, events, runtime
from gemm_cases import assert_exact, make_case
from test_cuda_opcheck import SAMPLES, K, N, dequantize_arguments

from resq_kernels.formats import pack_int4

HERE = Path(__file__).parent
FAILED = r"expected success, got invalid device function \(cudaErrorInvalidDeviceFunction\)"
INVALID_DEVICE = 101  # cudaErrorInvalidDevice
SHARED_LIMIT, CARVEOUT = 8, 9  # cudaFuncAttributeMaxDynamicSharedMemorySize, Preferred...Carveout
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a block may have
# M, (N, K_lo, K_hi): what the kernel of sm_90 with tensor maps and clusters runs.
MANY_ROWS = (130, (70, 784, 112), False)


def weight_codes() -> tuple[torch.Tensor, torch.Tensor]:
    codes_lo = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    return pack_int4(codes_lo), torch.randint(-128, 128, (N, 32), dtype=torch.int8)


OPERATORS = SAMPLES | {
    "pack_weight": lambda _: weight_codes(),
    "unpack_weight": lambda device: (device.pack_weight(*weight_codes()).clone(), N, K, 32),
}


@pytest.fixture
def new(sm90: Emulated) -> Emulated:
    """An H100 that the library has not seen."""
    return Emulated(90, new=True)


@pytest.fixture(autouse=True)
def only_own_events(sm90: Emulated) -> Iterator[None]:
    events()
    yield
    runtime().emulated_set_ptx_version(0)


def last_error() -> int:
    return emulator().runtime().cudaPeekAtLastError()


def test_a_thread_s_first_cuda_work_may_be_a_tensor_map(new: Emulated) -> None:
    case = make_case(*MANY_ROWS)
    arguments = case.arguments(new)
    events()
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            got = thread.submit(new.mixed_gemm, *arguments).result()
            assert torch.equal(got, case.expected())
    assert events("cudaSetDevice") == [f"cudaSetDevice {new.index}"]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_failed_launch_names_the_operator(name: str, device: Emulated) -> None:
    arguments = OPERATORS[name](device)
    runtime().emulated_fail(b"cudaLaunchKernelExC")
    with pytest.raises(RuntimeError, match=f"^{name}: launch: {FAILED}"):
        getattr(device, name)(*arguments)
    assert last_error() == 0  # it has been reported
    getattr(device, name)(*arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_older_error_is_neither_reported_nor_taken_away(name: str, device: Emulated) -> None:
    arguments = OPERATORS[name](device)
    with device.current(*arguments):
        assert emulator().runtime().cudaSetDevice(7) == INVALID_DEVICE
        getattr(getattr(torch.ops, NAMESPACE), name)(*arguments)
        assert last_error() == INVALID_DEVICE
        emulator().check()


def test_a_failed_question_about_clusters_is_asked_again(new: Emulated) -> None:
    case = make_case(*MANY_ROWS)
    runtime().emulated_fail(b"cudaOccupancyMaxActiveClusters")
    with pytest.raises(RuntimeError, match=f"^mixed_gemm: clusters: {FAILED}"):
        case.run(new)
    assert last_error() == 0
    for _ in range(2):
        assert_exact(case, new)
    assert len(events("cudaOccupancyMaxActiveClusters")) == 2


def test_a_failed_limit_of_shared_memory_is_set_again(new: Emulated) -> None:
    x = torch.randn(2, 64)
    runtime().emulated_fail(b"cudaFuncSetAttribute")
    with pytest.raises(RuntimeError, match=f"^hadamard: shared memory: {FAILED}"):
        new.hadamard(x)
    for _ in range(2):
        new.hadamard(x)
    assert len(events("cudaFuncSetAttribute")) == 2


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_the_limit_of_shared_memory_is_set_once_to_the_largest(sm90: Emulated, arch: int) -> None:
    new, columns = Emulated(arch, new=True), (64, 16384, 256)
    for n in columns:
        new.hadamard(torch.randn(2, n))
    assert events("cudaFuncSetAttribute") == [
        f"cudaFuncSetAttribute {SHARED_LIMIT} {SHARED_BYTES[arch]}"
    ]
    # This kernel has shared memory of its own.
    for n in columns:
        new.silu_mul_hadamard_quantize(torch.randn(2, 2 * n))
    (line,) = events(f"cudaFuncSetAttribute {SHARED_LIMIT}")
    assert SHARED_BYTES[arch] - 1024 < int(line.split()[2]) < SHARED_BYTES[arch]


def test_threads_share_the_limit_of_shared_memory(new: Emulated) -> None:
    rows = [torch.randn(2, n) for n in (64, 16384, 256, 8192)]
    with new.current(*rows), ThreadPoolExecutor(len(rows)) as threads:
        operator = getattr(torch.ops, NAMESPACE).hadamard
        for _ in range(3):
            list(threads.map(operator, rows))
        emulator().check()
    assert len(events("cudaFuncSetAttribute")) == 1


def test_a_device_is_asked_once(new: Emulated) -> None:
    for _ in range(3):
        new.mixed_quantize(torch.randn(2, K), 0)
        new.hadamard(torch.randn(2, 64))
    # major, minor, multiprocessors, shared memory, bus, second-level cache
    assert len(events("cudaDeviceGetAttribute")) == 6


def test_kernels_overlap_only_where_they_wait_for_each_other(sm80: Emulated, new: Emulated) -> None:
    x = torch.randn(2, K)
    assert new.cuda_pdl(new.index) == "on"
    new.mixed_quantize(x, 0)
    assert events("cudaLaunch") == ["cudaLaunchKernelExC pdl"]
    # Kernels from PTX of compute_80 hold no wait, whatever the device.
    runtime().emulated_set_ptx_version(80)
    old_code = Emulated(90, new=True)
    assert old_code.cuda_pdl(old_code.index).startswith("off: kernels run from PTX of compute_80")
    old_code.mixed_quantize(x, 0)
    sm80.mixed_quantize(x, 0)
    assert events("cudaLaunch") == ["cudaLaunchKernelExC"] * 2
    assert sm80.cuda_pdl(sm80.index) == "off: only the family sm90 has them"


def test_a_chain_of_quantizers_and_products_waits_for_all_before(sm90: Emulated) -> None:
    """Nothing completes the stream in between: a product may start with the one before it."""
    case = make_case(2, (96, 64, 32), packed=False, out_dtype=torch.bfloat16)
    weight = case.arguments(sm90)[3:]
    x = torch.randn(2, 96).bfloat16()

    def chain(operators: object) -> torch.Tensor:
        y = x
        for _ in range(3):
            y = operators.mixed_gemm(*operators.mixed_quantize(y, 32), *weight)
        return y

    expected = chain(sm90)  # each call is completed and checked
    events()
    with sm90.current(x, *weight[:-1]):
        got = chain(getattr(torch.ops, NAMESPACE))
        emulator().check()
    assert events("cudaLaunch") == ["cudaLaunchKernelExC pdl"] * 6
    assert torch.equal(got, expected)


def test_kernels_that_do_not_wait_are_launched_as_usual(new: Emulated) -> None:
    names = ("search_scale", "gptq_block", "pack_weight", "unpack_weight", "embedding")
    for name in (*names, "kv_dequantize"):
        getattr(new, name)(*OPERATORS[name](new))
    assert set(events("cudaLaunch")) == {"cudaLaunchKernelExC"}


PROGRAM = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent / "ops")!r}]
import conftest, emulation, torch
from gemm_cases import make_case
from test_cuda_opcheck import dequantize_arguments
conftest.library()
gpu = emulation.Emulated(90)
make_case(1, (64, 64, 32)).run(gpu)
emulation.events()
for _ in range(2):
    gpu.hadamard(torch.randn(2, 64))
    gpu.kv_dequantize(*dequantize_arguments(gpu))
print(*emulation.events("cudaFuncSetAttribute"), sep="\\n")
"""


def run_with(variable: str, text: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {variable: text, "RESQ_LOG_KERNELS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_kernel_asks_for_the_carveout(sm90: Emulated) -> None:
    """The library reads RESQ_CUDA_CARVEOUT once, so another process has it."""
    run = run_with("RESQ_CUDA_CARVEOUT", "75")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"cudaFuncSetAttribute {SHARED_LIMIT} {SHARED_BYTES[90]}",
        f"cudaFuncSetAttribute {CARVEOUT} 75",
        f"cudaFuncSetAttribute {CARVEOUT} 75",
    ]
    assert "resq_kernels: hadamard: cuda sm90, carveout 75 %\n" in run.stderr


@pytest.mark.parametrize("variable", ["RESQ_CUDA_CARVEOUT", "RESQ_CUDA_PREFETCH"])
def test_a_percentage_that_is_none_is_refused(sm90: Emulated, variable: str) -> None:
    run = run_with(variable, "101")
    assert f"{variable}: expected an integer from 0 to 100, got 101" in run.stderr


def test_without_the_variable_the_driver_chooses(new: Emulated) -> None:
    new.kv_dequantize(*dequantize_arguments(new))
    assert not events("cudaFuncSetAttribute")
