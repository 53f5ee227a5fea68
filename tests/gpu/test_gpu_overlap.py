"""What shows only under load: launches that overlap, threads, a thread's first CUDA call."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_cases import Weight, activations, gemm_on_both, on, same_bits

from resq_kernels import DecodeGraph
from resq_kernels.testing.quantized_models import random_quantized

REPLAYS, SEQUENCES, PROMPT = 1000, 3, 70
DELAY_CYCLES = 20_000  # some ten microseconds: about a step's launch


def one_step() -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Logits of a decode step of 4 layers, which is undone: by a graph, by calls."""
    torch.manual_seed(0)
    model = random_quantized("llama", num_hidden_layers=4).cuda()
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, PROMPT + 1)).cuda()
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).cache

    def ordinary() -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids[:, -1:], cache=cache, use_cache=True).logits[:, -1]
        cache.crop(-1)
        return logits

    graph = DecodeGraph(model, cache, 1)

    def replayed() -> torch.Tensor:
        logits = graph.step(ids[:, -1])
        cache.crop(-1)
        return logits

    return replayed, ordinary


def save_step(path: str) -> None:
    """Writes the logits of the step, as a process with other variables computes them."""
    torch.save(one_step()[1]().cpu(), path)


def test_replays_under_delay_keep_every_bit(tmp_path: Path) -> None:
    """A thousand replays against ordinary launches in another process, while kernels on another
    stream take multiprocessors and give them back."""
    path = str(tmp_path / "logits.pt")
    # Where this runs on the dry device, so does the other process.
    dry = [os.environ["RESQ_DRY_CUDA"]] if "RESQ_DRY_CUDA" in os.environ else []
    command = [sys.executable, *dry, __file__, path]
    variables = os.environ | {"RESQ_DEPENDENT_LAUNCHES": "0"}
    subprocess.run(command, env=variables, check=True, timeout=90)
    expected = torch.load(path)
    replayed, _ = one_step()
    side, wrong = torch.cuda.Stream(), torch.zeros((), dtype=torch.int64, device="cuda")
    first, delay = replayed(), 0
    for replay in range(REPLAYS if not dry else 3):
        delay = (delay * 1103515245 + 12345) % (1 << 31)  # another length every time
        with torch.cuda.stream(side):
            torch.cuda._sleep(delay % DELAY_CYCLES)
        wrong += (replayed() != first).any()
        if replay % 100 == 0:
            torch.cuda.synchronize()
    assert int(wrong) == 0, f"{int(wrong)} of {REPLAYS} replays differ from the first"
    # The head is torch's product, which may take another kernel in a capture.
    error = (first.cpu() - expected).norm() / expected.norm()
    assert error < 1e-5, f"the replays differ from ordinary launches by {float(error):.2g}"


def test_two_threads_with_two_widths() -> None:
    """A kernel's limits belong to the process: one thread must not lower them for another."""
    inputs = [torch.randn(3, width, device="cuda") for width in (448, 14336)]
    expected = [torch.ops.resq.hadamard(x, 1.0).cpu() for x in inputs]
    failures: list[str] = []

    def run(x: torch.Tensor, wanted: torch.Tensor) -> None:
        try:
            results = [torch.ops.resq.hadamard(x, 1.0) for _ in range(300)]
            if not all(same_bits(result.cpu(), wanted) for result in results):
                failures.append(f"{x.shape[1]}: another result")
        except RuntimeError as error:
            failures.append(f"{x.shape[1]}: {error}")

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("rows", [3, 130])
def test_a_thread_whose_first_call_is_mixed_gemm(rows: int) -> None:
    """No call before it has made a context current on the thread."""
    weight, inputs = Weight(200, 448, 64), activations(rows, 448, 64)
    expected, _ = gemm_on_both(weight, inputs, None, torch.float16)
    on_gpu = on("cuda", (*inputs, *weight.arguments("cuda"), None))
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: results.append(torch.ops.resq.mixed_gemm(*on_gpu, torch.float16))
    )
    thread.start()
    thread.join()
    assert len(results) == 1, "the call in the thread failed"
    assert same_bits(results[0].cpu(), expected)


if __name__ == "__main__":
    save_step(sys.argv[1])
