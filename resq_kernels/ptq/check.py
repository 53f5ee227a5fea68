"""Checks before any work: model and options fit, and the disk has room for the result."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path

import torch

from resq_kernels import _library, hadamard, kv_pages
from resq_kernels.architecture import DOWN_PROJ, LINEARS, ModelShape
from resq_kernels.config import ResQConfig
from resq_kernels.ptq.decoder import product_dtype
from resq_kernels.ptq.workspace import work_folder

MOST_PART_COLUMNS = 65536
"""kMostPartColumns of csrc/ops/mixed_gemm/mixed_gemm.h: beyond, sums of 32 bits can wrap."""

CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where the kernel says how much memory a container may have, in version 2 and 1 of cgroups."""


def check_shape(shape: ModelShape, config: ResQConfig) -> None:
    """Refuses a model whose sizes the options cannot split, transform or store.

    Raises:
        ValueError: names the key of config.json or the linear, the option, and what it must be.
    """
    for key, size in (
        ("hidden_size", shape.hidden),
        ("head_dim", shape.head_dim),
        ("intermediate_size", shape.intermediate),
    ):
        if size % 2:
            raise ValueError(
                f"{key}: expected an even number (4-bit codes are stored in pairs), got {size}"
            )
    for name in LINEARS:
        k_hi = shape.k_hi(name, config)
        largest = max(shape.linear(name)[1] - k_hi, k_hi)
        if largest > MOST_PART_COLUMNS:
            raise ValueError(
                f"{name}: expected at most {MOST_PART_COLUMNS} columns in INT4 and in INT8, got "
                f"{largest}"
            )
    if config.embedding_bits == 8 and shape.hidden > MOST_PART_COLUMNS:
        raise ValueError(
            f"hidden_size: expected at most {MOST_PART_COLUMNS} with embedding_bits 8, got "
            f"{shape.hidden}"
        )
    sizes = {}
    if config.rotates and not shape.hadamard_block(config):
        sizes[f"{DOWN_PROJ}: intermediate_size"] = shape.intermediate
    if config.method == "quarot":
        sizes |= {"hidden_size": shape.hidden, "head_dim": shape.head_dim}
    for name, size in sizes.items():
        try:
            hadamard.factors(size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; method 'rtn' needs no such size") from error
    if config.kv_bits == 4 and shape.head_dim not in kv_pages.HEAD_DIMS:
        allowed = " or ".join(map(str, kv_pages.HEAD_DIMS))
        raise ValueError(
            f"head_dim: expected {allowed} with kv_bits 4, got {shape.head_dim}; kv_bits 16 leaves "
            "keys and values as they are"
        )
    if config.mixed and shape.head_dim % 16:
        # The bases of keys and values are split at 1/8 of a head whatever the cache holds.
        raise ValueError(
            f"head_dim: expected a multiple of 16 with method {config.method!r}, got "
            f"{shape.head_dim}"
        )


def check_device(device: str) -> None:
    """Refuses a GPU without this package's kernels, by which the rounded layers are computed.

    Raises:
        ValueError: names the device, and why there are no kernels.
    """
    if device.startswith("cuda") and _library.CUDA_MISSING:
        raise ValueError(
            f"device: expected cpu, or a GPU with the kernels of resq_kernels, got {device} "
            f"({_library.CUDA_MISSING})"
        )


def work_bytes(
    shape: ModelShape, config: ResQConfig, windows: int, seqlen: int, item_bytes: int
) -> int:
    """Peak size of the work folder in bytes, the result included, within a few percent.

    Args:
        shape: sizes of the model.
        config: the options.
        windows, seqlen: calibration tokens; hidden states and an input, in codes or exact, are
            stored.
        item_bytes: size of an element of the embedding.
    """
    linears = sum(shape.linear(name)[0] * (shape.linear(name)[1] + 8) for name in LINEARS)
    quantized = shape.layers * linears * 9 // 16
    # What a training begins with, its state, and the next, written before the last is deleted.
    trained = 28 * _trained(shape, config) if config.distill_epochs else 0
    head = shape.kv_heads * shape.head_dim**2
    moments = 8 * (3 * shape.hidden**2 + shape.layers * (7 * head + 3 * shape.intermediate))
    if config.rotations == "learned":  # the bases, their state, and the next one
        moments += 3 * 8 * (shape.hidden**2 + 2 * shape.layers * head)
    states = 4 * 4 * windows * seqlen * shape.hidden
    # Layers exist twice while they are joined; hidden states are deleted by then.
    vocabulary = 2 * shape.vocab * shape.hidden * item_bytes
    if config.embedding_bits == 8:
        vocabulary = (1 if shape.tied else 2) * shape.vocab * (shape.hidden + 8)
    joined = (3 if config.distill_epochs else 2) * quantized + vocabulary
    widest = max(shape.linear(name)[1] for name in LINEARS)
    row = widest + 16 if config.hessian_inputs == "rounded" else 4 * widest
    return moments + max(states + windows * seqlen * row + quantized + trained, joined)


def check_memory(
    shape: ModelShape, config: ResQConfig, device: str, dtype: torch.dtype, seqlen: int
) -> None:
    """Refuses a training that does not fit the device's memory, however empty it is.

    Formula, for a distillation: the codes of all linears; 12 bytes for each value that is trained:
    itself and Adam's two moments in float32; the head in 16 bits; one layer in float32 with
    gradients. 17 GB for Llama-3-8B. For learned rotations: the float model's linears and head in
    the dtype of its products, its embedding, one layer in float32 with a copy in float64, and for
    a window every layer's input and 40 rows of a layer's widest activations in float32. 25 GB for
    Llama-3-8B in bfloat16 and windows of 2048.

    Args:
        shape: sizes of the model.
        config: the options.
        device: where it is trained.
        dtype: of the source's weights.
        seqlen: tokens of a window.

    Raises:
        ValueError: names the option, and both sizes.
    """
    weights = sum(math.prod(shape.linear(name)) for name in LINEARS)
    needs: list[tuple[str, int, str, str]] = []  # option, bytes, for what, what needs less
    if config.rotations == "learned":
        item, vocabulary = product_dtype(dtype, device).itemsize, shape.vocab * shape.hidden
        needed = item * (shape.layers * weights + vocabulary) + dtype.itemsize * vocabulary
        needed += 12 * weights
        needed += 4 * seqlen * ((shape.layers + 1) * shape.hidden + 40 * shape.intermediate)
        needs.append(("rotations", needed, " for 'learned'", "'random' learns nothing"))
    if config.distill_epochs:
        high = _trained(shape, config)
        needed = (shape.layers * weights + high) // 2 + 12 * high + 8 * weights
        needed += 2 * shape.vocab * shape.hidden
        needs.append(("distill_epochs", needed, "", "0 trains nothing"))
    for option, needed, purpose, instead in needs:
        if needed > (memory := device_memory(device)):
            raise ValueError(
                f"{option}: expected at least {needed / 1e9:.1f} GB of memory on {device}{purpose},"
                f" got {memory / 1e9:.1f} GB; {instead}"
            )


def device_memory(device: str) -> int:
    """Bytes of memory that this process may have on a device, in use or not."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in filter(Path.is_file, CONTAINER_LIMITS):
        text = limit.read_text().strip()
        memory = min(memory, int(text)) if text.isdigit() else memory
    return memory


def _trained(shape: ModelShape, config: ResQConfig) -> int:
    """Values that a distillation trains: INT8 weights, and a gain for every row."""
    rows = ((shape.linear(name)[0], shape.k_hi(name, config)) for name in LINEARS)
    return shape.layers * sum(n * (k_hi + 1) for n, k_hi in rows)


def check_disk(out: Path, needed: int, what: str = "the work folder and the result") -> None:
    """Refuses to begin if the disk is too small; the present work folder counts as free space.

    Args:
        out: the folder that is being written.
        needed: bytes.
        what: what needs them.

    Raises:
        OSError: ENOSPC, with both sizes.
    """
    work = work_folder(out)
    parent = next(path for path in out.absolute().parents if path.exists())
    used = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + used
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out}: expected {needed / 1e9:.1f} GB of free disk for {what}, got "
            f"{free / 1e9:.1f} GB",
        )
