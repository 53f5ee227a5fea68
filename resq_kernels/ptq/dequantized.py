"""A folder that another quantizer made, as the float weights that transformers makes of it.

transformers checks little here: a weight whose scale is missing, or whose blocks do not divide it,
becomes a wrong matrix without a word. What decides that is compared first.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from resq_kernels.safetensors_io import FLOAT_DTYPES, CheckpointError, CheckpointReader, dtype_name

# quant_method -> the packages that transformers needs to turn it back: module -> name for pip.
PACKAGES = {
    "fp8": {"accelerate": "accelerate"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"},
}
# Of a weight that is no float: what one of must be stored beside it.
_SCALES = {
    "fp8": ("weight_scale_inv",),
    "compressed-tensors": ("weight_scale",),
    "bitsandbytes": ("SCB", "weight.absmax"),
}
# Scales of activations and of the cache, which float weights do without.
_IGNORED = r"\.(input|output|activation|k|v|q)_(scale|zero_point|global_scale)$"


def check_method(stored: Mapping[str, Any]) -> None:
    """Refuses a `quantization_config` that transformers cannot turn back on this machine.

    Raises:
        ValueError: another method, or a setting that transformers would pass over.
        ImportError: a package is missing; the message says what to install.
    """
    method = stored.get("quant_method", "unknown")
    method = getattr(method, "value", method)
    quantized = f"expected a 16-bit model, got one that is already quantized ({method})"
    if method not in PACKAGES:
        raise ValueError(
            f"{quantized}, which cannot be turned back into 16 bits; give the 16-bit model that it "
            "was made from"
        )
    packages = PACKAGES[method].items()
    missing = [name for module, name in packages if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{quantized}: reading it needs `pip install {' '.join(missing)}`")
    if method != "compressed-tensors":
        return
    groups = stored.get("config_groups")
    schemes = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError(f"{quantized}: config_groups: expected one scheme of weights, got several")
    sparse = stored.get("sparsity_config") or {}
    if stored.get("transform_config") or sparse.get("format", "dense") != "dense":
        raise ValueError(f"{quantized} with transforms or sparse weights, which are not read here")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The float weights of the model. Memory: all of them, and what they are made from.

    Raises:
        CheckpointError: tensors are missing, left over or do not fit each other.
        ValueError, ImportError: as `check_method`.
    """
    from transformers import (
        AutoModelForCausalLM,
        CompressedTensorsConfig,
        FineGrainedFP8Config,
        GenerationConfig,
    )

    reader = CheckpointReader(folder)
    stored = reader.config["quantization_config"]
    check_method(stored)
    method = stored["quant_method"]
    _check_scales(reader, method, stored)
    options: dict[str, Any] = {}
    if method == "fp8":
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    elif method == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            output_loading_info=True,
            # Not the folder's file: what it asks for may not even load.
            generation_config=GenerationConfig(),
            **options,
        )
        if method == "bitsandbytes":
            model = model.dequantize()
    except Exception as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: transformers does not load it: {text}") from error
    unexpected = [k for k in report["unexpected_keys"] if not re.search(_IGNORED, k)]
    for name in sorted([*report["missing_keys"], *report["mismatched_keys"], *unexpected]):
        raise CheckpointError(f"{folder}: {name}: expected the model's tensors and their scales")
    tensors: dict[str, torch.Tensor] = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{folder}: {name}: expected a float tensor from transformers, got "
                f"{dtype_name(tensor.dtype)}"
            )
    return tensors


def _check_scales(reader: CheckpointReader, method: str, stored: Mapping[str, Any]) -> None:
    """Refuses a quantized weight without its scales, or with scales of other blocks.

    Raises:
        CheckpointError: names the weight.
    """
    block = stored.get("weight_block_size")
    for name, info in reader.tensors.items():
        place, _, end = name.rpartition(".")
        if end not in ("weight", "weight_packed") or info.kind in ("BF16", "F16", "F32"):
            continue
        found = [f"{place}.{scale}" for scale in _SCALES[method] if f"{place}.{scale}" in reader]
        if not found:
            raise CheckpointError(
                f"{reader.folder}: {name}: expected {' or '.join(_SCALES[method])} beside it, "
                "found nothing"
            )
        grid = reader.info(found[0]).shape
        if (
            method == "fp8"
            and block
            and info.shape != tuple(count * size for count, size in zip(grid, block, strict=False))
        ):
            raise CheckpointError(
                f"{reader.folder}: {name}: expected whole blocks of {list(block)}, got "
                f"{list(info.shape)} with {list(grid)} scales"
            )
