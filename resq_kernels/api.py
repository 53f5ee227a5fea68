"""Quantizing and loading from Python, as `resq quantize` and `resq generate` do."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_kernels import checkpoint
from resq_kernels.architecture import ModelShape
from resq_kernels.config import ResQConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Sequence[str],
    config: ResQConfig | None = None,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """A quantized drop-in for a Llama or Qwen2 model; `save_pretrained` keeps it.

    Needs disk space for a copy of the model and its quantized form in the temporary folder
    (TMPDIR).

    Args:
        model: a transformers model in 16-bit or float32; it is not changed.
        tokenizer: the model's tokenizer.
        calibration: texts; `config.samples` windows of `config.seqlen` tokens are cut from them.
        config: the options; default `ResQConfig()`.
        progress: bars on stderr.

    Returns:
        A model of the same class on the CPU, in the dtype of `model`.

    Raises:
        ValueError: another architecture, a model that is quantized already, or too little text.

    Source: arXiv 2412.14363.
    """
    from resq_kernels.ptq.calibrate import windows
    from resq_kernels.ptq.check import check_shape
    from resq_kernels.ptq.pipeline import quantize_folder

    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("quantize: model: expected a float model, got a quantized one")
    config = config or ResQConfig()
    check_shape(ModelShape.from_config(model.config.to_dict()), config)
    tokens = windows(tokenizer, calibration, config.samples, config.seqlen, config.seed)
    with tempfile.TemporaryDirectory(prefix="resq-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "quantized"
        model.save_pretrained(source)
        quantize_folder(source, out, tokens, config, progress=progress)
        quantized = type(model).from_pretrained(out, dtype=model.dtype)
    quantized.config._name_or_path = model.config._name_or_path
    return quantized


def from_pretrained(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` of a quantized folder, refusing any other.

    Args:
        path: a folder that `resq quantize` or `save_pretrained` wrote, or a name on the hub.
        kwargs: for transformers, such as `dtype` or `device_map`.

    Raises:
        ValueError: the model is not quantized with ResQ.
        CheckpointError: the folder is damaged, incomplete or of a newer format.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
    config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in where if k in kwargs})
    entry = getattr(config, "quantization_config", None) or {}
    if entry.get("quant_method") != checkpoint.QUANT_METHOD:
        raise ValueError(
            f"from_pretrained: {path}: expected a model quantized with ResQ, got quant_method "
            f"{entry.get('quant_method')!r}; make one with `resq quantize`"
        )
    folder = Path(path) / kwargs.get("subfolder", "")
    if folder.is_dir():
        checkpoint.validate(folder, variant=kwargs.get("variant"))
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)
