"""Runs a quantization that is killed again and again; started by test_resume.py.

python kill_points.py SOURCE OUT TOKENS MODE. Every attempt is a forked process with resume=True
that ends by SIGKILL: right after or right before it gives a file its name, the 1st, 2nd, ... 9th
of an attempt in turn (modes "after" and "before"), or when the parent's patience is over, which
grows by the factor 1.6 from 0.2 seconds ("timer"). Prints the number of attempts that died.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

from resq_kernels.config import ResQConfig
from resq_kernels.ptq.decoder import rope_tables
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.safetensors_io import read_json


def attempt(source: Path, out: Path, tokens: torch.Tensor, mode: str, last: int) -> None:
    """One try in the child; a timer is the parent's business."""
    rename, calls = os.replace, 0

    def replace(before: str, after: str) -> None:
        nonlocal calls
        calls += 1
        if mode == "before" and calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(before, after)
        if mode == "after" and calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    quantize_folder(source, out, tokens, ResQConfig(), resume=True, progress=False)


def main() -> None:
    """Attempts until one succeeds."""
    source, out, tokens, mode = sys.argv[1:]
    torch.set_num_threads(1)
    windows = torch.load(tokens)
    # Imports that a run makes late are made once here, instead of in every attempt.
    importlib.import_module("matplotlib.backends.backend_svg")
    rope_tables(read_json(Path(source) / "config.json"), Path(source), 1)
    for died in range(200):
        pid = os.fork()
        if pid == 0:
            attempt(Path(source), Path(out), windows, mode, died % 9 + 1)
            os._exit(0)
        if mode == "timer":
            time.sleep(0.2 * 1.6**died)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"attempt {died} failed")
            print(died)
            return
    sys.exit("no progress")


if __name__ == "__main__":
    main()
