"""Quantizing and loading from Python, as `resq quantize` and `resq generate` do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
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
    calibration: str | Iterable[str | Mapping[str, object]],
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
        calibration: a text, or texts, or {"text": ...} of each; `config.samples` windows of
            `config.seqlen` tokens are cut from them.
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
    texts = _texts(calibration)
    if not callable(tokenizer):
        raise ValueError(f"quantize: tokenizer: expected a tokenizer, got {tokenizer!r}")
    tokens = windows(tokenizer, texts, config.samples, config.seqlen, config.seed)
    with tempfile.TemporaryDirectory(prefix="resq-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "quantized"
        model.save_pretrained(source)
        quantize_folder(source, out, tokens, config, progress=progress)
        quantized = type(model).from_pretrained(out, dtype=model.dtype)
    quantized.config._name_or_path = model.config._name_or_path
    return quantized


def _texts(calibration: object) -> list[str]:
    """The calibration texts: of one text, or of an iterable of texts or of {"text": ...}."""
    wanted = "quantize: calibration: expected a text or texts, got"
    if isinstance(calibration, str):
        calibration = [calibration]
    if not isinstance(calibration, Iterable) or isinstance(calibration, Mapping | bytes | set):
        raise ValueError(
            f"{wanted} {type(calibration).__name__}; read a file with Path.read_text()"
        )
    found = []
    for item in calibration:
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise ValueError(f"{wanted} an item of type {type(item).__name__}")
        if len(text) < 1024 and "\0" not in text and os.path.isfile(text):
            raise ValueError(
                f"{wanted} the name of a file, {text!r}; pass Path({text!r}).read_text()"
            )
        found.append(text)
    return found


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
