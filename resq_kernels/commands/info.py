"""`resq info`: versions, devices, kernels; what a model folder holds."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import resq_kernels
from resq_kernels.commands import loading, output

SUMMARY = "versions, devices, kernel variants; what a model folder holds"
DESCRIPTION = """\
Without MODEL: versions, devices, which kernel variants are built and which will run, and why CUDA
is not used if it is not. With MODEL (a folder, hub name or GGUF file) also how it is quantized and
the bytes of each part.

examples:
  resq info
  resq info out/llama-resq --json info.json
"""

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `resq info`."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="HF folder, hub name or GGUF file"
    )


def run(args: argparse.Namespace) -> None:
    """Prints and writes --json.

    Raises:
        CommandError: MODEL cannot be read.
    """
    output.check_target(args.json)
    figures: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "cpu": cpu(),
        "cuda": cuda(),
    }
    rows = [(name, version) for name, version in figures["versions"].items()]
    rows += [
        ("machine", f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores"),
        ("threads", str(figures["machine"]["threads"])),
        ("CPU kernels", _cpu_line(figures["cpu"])),
        ("CUDA", _cuda_line(figures["cuda"])),
    ]
    if args.model:
        figures["model"] = model_figures(args.model)
        rows += _model_rows(figures["model"])
    print(output.table(rows))
    output.write_json(args.json, figures)


def versions() -> dict[str, str]:
    """Versions of this package, its checkpoint format, Python and the libraries."""
    from resq_kernels.formats import FORMAT_VERSION

    found = {"resq_kernels": resq_kernels.__version__, "checkpoint format": str(FORMAT_VERSION)}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores, torch's threads and the memory in bytes."""
    import torch

    pages, page = (os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": pages * page,
    }


def cpu() -> dict[str, Any]:
    """CPU kernel variants: those built, the one that runs here, the features that the machine lacks
    for each of the others, and whether the choice was forced.

    Raises:
        RuntimeError: RESQ_CPU_ISA names a variant that does not exist or cannot run here.
    """
    import torch

    from resq_kernels import _library  # noqa: F401  registers torch.ops.resq.*

    return {
        "built": list(built_cpu_variants(platform.machine())),
        "chosen": torch.ops.resq.cpu_isa(),
        "missing": dict(
            line.split(": ", 1) for line in torch.ops.resq.cpu_isa_missing().split("; ") if line
        ),
        "forced_by_RESQ_CPU_ISA": os.environ.get("RESQ_CPU_ISA") or None,
    }


def built_cpu_variants(architecture: str) -> tuple[str, ...]:
    """Instruction sets that csrc/cpu/isa.cpp can choose from; vector ones exist on x86-64 only."""
    vector = ("avx2", "avx512vnni", "amx") if architecture in ("x86_64", "AMD64") else ()
    return ("scalar", *vector)


def cuda() -> dict[str, Any]:
    """Whether CUDA kernels run, the devices, and if they do not, why."""
    import torch

    from resq_kernels import _library

    devices = []
    reason = _library.CUDA_MISSING or None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            device = {
                "name": torch.cuda.get_device_name(index),
                "capability": f"sm_{major}{minor}",
                "kernels": None,
                "dependent_launches": None,
            }
            if reason is None:
                device["kernels"] = _of_device(torch.ops.resq.cuda_family, index)
                device["dependent_launches"] = _of_device(torch.ops.resq.cuda_pdl, index)
            devices.append(device)
    elif reason is None:
        reason = "torch sees no CUDA device (driver missing, or hidden by CUDA_VISIBLE_DEVICES)"
    return {
        "used": reason is None,
        "why_not": reason,
        "torch_cuda": torch.version.cuda,
        "kernels_built": _library.CUDA_LIBRARY.exists(),
        "devices": devices,
    }


def _of_device(query: Callable[[int], str], index: int) -> str:
    """What the library says about a device, or why it runs no kernels there."""
    try:
        return query(index)
    except RuntimeError as error:
        return f"none: {str(error).splitlines()[0]}"


def model_figures(model: str) -> dict[str, Any]:
    """What a model is: its shape, its quantization, its weights.

    A folder may hold any model of the hub's kind, with weights that nothing here can load.

    Raises:
        CommandError, CheckpointError: there is no such model, or the folder is damaged.
    """
    from resq_kernels.commands.sizes import part_sizes
    from resq_kernels.ptq.workspace import REPORT_FILE
    from resq_kernels.safetensors_io import find_weights, read_json

    folder = Path(model)
    weights, parts, options = None, None, None
    if folder.exists() and not loading.is_gguf(model):
        loading.check_folder(folder)
        config = read_json(folder / "config.json")
        found = find_weights(folder, config)
        weights = None if found is None else found.name
        if found is not None and ".bin" not in found.suffixes:
            parts = part_sizes(folder)
        options = _options(folder / REPORT_FILE)
    else:
        config = loading.load_config(model).to_dict()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "vocab_size", "max_position_embeddings"]
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    text = config.get("text_config")
    sizes = config | text if isinstance(text, dict) else config
    return {
        "name": model,
        "architecture": str(named or "unknown"),
        "shape": {name: sizes.get(name) for name in names},
        "quantization": config.get("quantization_config"),
        "options": options,
        "weights": weights,
        "bytes": parts,
    }


def _options(path: Path) -> dict[str, Any] | None:
    """The preset and options of a report, which has those that loading a folder does not need."""
    from resq_kernels.safetensors_io import read_json

    if not path.is_file():
        return None
    report = read_json(path)
    config = report.get("config")
    return {"preset": report.get("preset"), **config} if isinstance(config, dict) else None


def _model_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    shape, quantized, parts = figures["shape"], figures["quantization"], figures["bytes"]
    sizes = ", ".join(f"{value} {name}" for name, value in shape.items() if value)
    rows = [
        ("model", f"{figures['name']} ({figures['architecture']})"),
        ("shape", sizes or "not in config.json"),
    ]
    if isinstance(quantized, dict):
        rows += [(key, str(value)) for key, value in quantized.items()]
        others = (figures["options"] or {}).items()
        rows += [(key, str(value)) for key, value in others if key not in quantized]
    else:
        rows.append(("quantization", "none" if quantized is None else str(quantized)))
    if Path(figures["name"]).is_dir():
        weights = figures["weights"] or "none that transformers loads"
        rows.append(("weights", weights + ("" if parts else " (bytes are those of safetensors)")))
    if parts is not None:
        rows += [
            (name.replace("_", " "), output.size(count)) for name, count in parts.items() if count
        ]
    return rows


def _cpu_line(figures: dict[str, Any]) -> str:
    """The variant that runs, and why no better one does."""
    line = f"{figures['chosen']} of {', '.join(figures['built'])}"
    if figures["forced_by_RESQ_CPU_ISA"]:
        return f"{line} (forced by RESQ_CPU_ISA)"
    for name, features in figures["missing"].items():
        return f"{line} ({name}: this machine lacks {features})"
    return line


def _cuda_line(figures: dict[str, Any]) -> str:
    if not figures["used"]:
        return f"not used: {figures['why_not']}"
    return ", ".join(
        f"{d['name']} ({d['capability']}, {d['kernels']} kernels, "
        f"dependent launches {d['dependent_launches']})"
        for d in figures["devices"]
    )


def _cpu_name() -> str:
    """The processor's name as Linux gives it, or Python's where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
