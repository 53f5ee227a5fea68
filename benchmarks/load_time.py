"""How long a model takes to load, quantized and in 16 bits: each in a process of its own, in turn.

The time is that of the first `from_pretrained` of a process that has imported torch, transformers
and resq_kernels, and that until the first logits after it: a 16-bit folder is mapped, so that its
weights are read only then. Both folders are read once before, so that files come from memory.
Every load of a folder has to give the same logits, and both folders the same model: their KL
divergence is in the table.

    python benchmarks/load_time.py QUANTIZED SOURCE --text heldout.txt
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resq_kernels.bench import timing
from resq_kernels.commands.arguments import at_least
from resq_kernels.commands.output import check_target, table, write_json

_TOKENS = 64
_FIGURES = ("load_s", "first_logits_s", "load_cpu_s", "peak_mib", "files_mib")
_LOAD = """
import json, resource, sys, time
import torch
import transformers.models.llama.modeling_llama, transformers.models.qwen2.modeling_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer
import resq_kernels

folder, text, tokens, out = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(open(text).read(20000), return_tensors="pt").input_ids
before, cpu = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(folder)
loaded, used = time.perf_counter(), time.process_time()
with torch.no_grad():
    model(ids[:, :1])
    read = time.perf_counter()
    logits = model(ids[:, :int(tokens)]).logits[0]
torch.save(logits.float(), out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([loaded - before, read - before, used - cpu, peak]))
"""


def load(folder: Path, text: Path) -> tuple[list[float], torch.Tensor]:
    """Loads a folder in a new process.

    Returns:
        Seconds of the load, seconds until the first logits, CPU seconds of the load and the
        process's peak in MiB; logits [tokens, vocabulary] of the text's first tokens.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "logits.pt"
        command = [sys.executable, "-c", _LOAD, str(folder), str(text), str(_TOKENS), str(out)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            raise RuntimeError(f"load_time: {folder}: expected a model, got {ran.stderr.strip()}")
        return json.loads(ran.stdout), torch.load(out)


def race(folders: dict[str, Path], text: Path, turns: int) -> dict[str, Any]:
    """Loads every folder `turns` times, in turn.

    Args:
        folders: "quantized" and "16-bit", name -> folder of the same model.
        text: what the logits are of.
        turns: loads of each that count; one before them does not.

    Returns:
        Every turn's figures, the medians and their ratios, and KL(16-bit || quantized) in nats.

    Raises:
        RuntimeError: two loads of a folder gave different logits, or a process failed.
    """
    figures: dict[str, list[list[float]]] = {name: [] for name in folders}
    logits: dict[str, torch.Tensor] = {}
    for turn in range(turns + 1):
        for name, folder in folders.items():
            got, own = load(folder, text)
            if not torch.equal(logits.setdefault(name, own), own):
                raise RuntimeError(f"load_time: {folder}: expected the same logits every time")
            figures[name] += [got] if turn else []
    for name, rows in figures.items():
        size = sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
        figures[name] = [[*row, size / 2**20] for row in rows]
    medians = {
        name: [median(column) for column in zip(*rows, strict=True)]
        for name, rows in figures.items()
    }
    exact, rounded = (logits[name].log_softmax(-1) for name in ("16-bit", "quantized"))
    pairs = zip(_FIGURES, medians["quantized"], medians["16-bit"], strict=True)
    return {
        "turns": {
            name: [dict(zip(_FIGURES, row, strict=True)) for row in rows]
            for name, rows in figures.items()
        },
        "median": {name: dict(zip(_FIGURES, row, strict=True)) for name, row in medians.items()},
        "ratio": {name: ours / theirs for name, ours, theirs in pairs},
        "kl_nats": (exact.exp() * (exact - rounded)).sum(-1).mean().item(),
        "machine": timing.machine(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quantized", type=Path, help="a quantized folder")
    parser.add_argument("source", type=Path, help="the 16-bit folder that it was made from")
    parser.add_argument("--text", type=Path, required=True, help="a text of some pages")
    parser.add_argument("--turns", type=at_least(1), default=10, help="loads of each (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(arguments)
    check_target(options.json)
    folders = {"quantized": options.quantized, "16-bit": options.source}
    result = race(folders, options.text, options.turns)
    formats = (".3f", ".3f", ".3f", ".0f", ".0f")
    rows = [
        [name, *map(format, figures.values(), formats)]
        for name, figures in result["median"].items()
    ]
    rows.append(["ratio", *(f"{value:.2f}" for value in result["ratio"].values())])
    print(table(rows, ["", "load, s", "to logits, s", "CPU, s", "peak, MiB", "files, MiB"]))
    print(f"KL {result['kl_nats']:.4f} nats; medians of {options.turns} turns")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
