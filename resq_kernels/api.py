"""Quantizing and loading from Python, as `resq quantize` and `resq generate` do."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resq_kernels import checkpoint
from resq_kernels.architecture import EMBEDDING, HEAD, ModelShape
from resq_kernels.config import HELD_OUT, ResQConfig
from resq_kernels.safetensors_io import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str | Iterable[str | Mapping[str, object]],
    config: ResQConfig | None = None,
    *,
    report: str | Path | None = None,
    held_out: int | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """A quantized drop-in for a model of a supported type; `save_pretrained` keeps it.

    Needs disk space for a copy of the model and its quantized form in the temporary folder
    (TMPDIR).

    Args:
        model: a causal language model of transformers in 16-bit or float32, on any device, in
            training mode or not, compiled or not; it is not changed.
        tokenizer: the model's tokenizer.
        calibration: a text, or texts, or {"text": ...} of each; `config.samples` windows of
            `config.seqlen` tokens are cut from them, less those that `model` writes itself
            (`config.dialogues`).
        config: the options; default `ResQConfig()`, with windows no longer than the model's
            positions.
        report: a folder, made if need be, that gets quantization_report.json and .html, as
            `resq quantize` writes them.
        held_out: other windows of the texts, on which that report compares the result with
            `model`: default 4, fewer if the texts have fewer left. 0: it does not.
        progress: bars on stderr.

    Returns:
        A model of the same class on the CPU, in the dtype and with the generation settings of
        `model`, in evaluation mode.

    Raises:
        ValueError: another architecture, a model that is quantized already, has adapters or keeps
            weights elsewhere than in memory, a tokenizer of another model, too little text, or
            windows beyond the model's positions.
        FileExistsError: `report` is a file.

    Source: arXiv 2412.14363.
    """
    from resq_kernels.ptq.calibrate import windows
    from resq_kernels.ptq.check import check_shape
    from resq_kernels.ptq.dialogues import plan
    from resq_kernels.ptq.float_folder import named_as
    from resq_kernels.ptq.pipeline import quantize_folder
    from resq_kernels.ptq.report import write_report

    model, shape = _check_model(model)
    config = _check_config(model, config)
    check_shape(shape, config)
    texts = _texts(calibration)
    if not callable(tokenizer):
        raise ValueError(f"quantize: tokenizer: expected a tokenizer, got {tokenizer!r}")
    spare = _check_held_out(held_out, report)
    config, dialogues = plan(config, tokenizer, shape, model.dtype, "cpu", spare)
    tokens = windows(tokenizer, texts, config.text_samples, config.seqlen, config.seed, spare)
    largest = int(torch.cat(tokens).max())
    if largest >= shape.vocab:
        raise ValueError(
            f"quantize: tokenizer: expected ids below {shape.vocab} (the model's vocab_size), got "
            f"{largest}; is it the model's? (`model.resize_token_embeddings`)"
        )
    if report is not None:
        if not Path(report).is_dir() and os.path.lexists(report):
            raise FileExistsError(f"quantize: report: expected a folder, got the file {report}")
        Path(report).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=report).close()  # refuses a read-only folder before the work
    with tempfile.TemporaryDirectory(prefix="resq-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "quantized"
        # Of no use to the caller: the names of folders that are gone.
        with _bars(progress), named_as(out, "TMPDIR"), named_as(source, "quantize: model"):
            _write(model, source)
            figures = quantize_folder(
                source,
                out,
                tokens.calibration,
                config,
                held_out=tokens.held_out,
                dialogues=dialogues,
                progress=progress,
            )
        with _bars(progress):
            quantized = type(model).from_pretrained(out, dtype=model.dtype)
    quantized.config._name_or_path = model.config._name_or_path
    if model.can_generate():
        quantized.generation_config = copy.deepcopy(model.generation_config)
    if report is not None:
        name = Path(model.config._name_or_path).name or type(model).__name__
        write_report(Path(report), {**figures, "model": name})
    return quantized


def _check_model(model: Any) -> tuple[PreTrainedModel, ModelShape]:
    """The model without the wrapper of torch.compile, and its sizes, if it can be quantized.

    Raises:
        ValueError: it is wrapped otherwise, quantized, of another architecture, has adapters, or
            lacks weights in memory.
    """
    from transformers import PreTrainedModel

    wanted = "quantize: model: expected"
    model = getattr(model, "_orig_mod", model)
    merge = "merge its adapters first (peft: `model = model.merge_and_unload()`)"
    if not isinstance(model, PreTrainedModel):
        advice = merge if hasattr(model, "peft_config") else "pass the model itself"
        raise ValueError(f"{wanted} a model of transformers, got {type(model).__name__}; {advice}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{wanted} a float model, got a quantized one")
    try:
        shape = ModelShape.from_config(model.config.to_dict())
    except ValueError as error:
        raise ValueError(f"quantize: model: {error}") from None
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if ".base_layer." in name:
            raise ValueError(f"{wanted} a model without adapters, got {name}; {merge}")
        if tensor.is_meta:
            raise ValueError(
                f"{wanted} weights in memory, got {name} on the meta device (offloaded, or never "
                "loaded); load the model without device_map, or use `resq quantize` on its folder, "
                "which needs memory for one layer"
            )
        if type(tensor) is not torch.Tensor:
            raise ValueError(f"{wanted} plain tensors, got {name} of type {type(tensor).__name__}")
    if not {EMBEDDING, HEAD} <= set(tensors):
        raise ValueError(
            f"{wanted} a causal language model with {EMBEDDING} and {HEAD}, got "
            f"{type(model).__name__}; load it with AutoModelForCausalLM (AutoModel and others load "
            "the decoder of a quantized folder)"
        )
    return model, shape


def _check_config(model: PreTrainedModel, config: ResQConfig | None) -> ResQConfig:
    """The options; by default with windows that the model has positions for.

    Raises:
        ValueError: they are of another type, or their windows are longer than that.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if config is None:
        seqlen = ResQConfig().seqlen
        return ResQConfig(seqlen=seqlen if limit is None else min(seqlen, limit))
    if not isinstance(config, ResQConfig):
        raise ValueError(
            f"quantize: config: expected a ResQConfig, got {type(config).__name__}; pass "
            "ResQConfig(samples=..., ...)"
        )
    if limit is not None and config.seqlen > limit:
        raise ValueError(
            f"quantize: config: seqlen: expected at most {limit} (the model's "
            f"max_position_embeddings), got {config.seqlen}"
        )
    return config


def _check_held_out(held_out: int | None, report: object) -> int:
    """The windows to hold out: none without a report.

    Raises:
        ValueError: not a number of windows, or one without a report.
    """
    if held_out is None:
        return 0 if report is None else HELD_OUT
    if not isinstance(held_out, int) or isinstance(held_out, bool) or held_out < 0:
        raise ValueError(f"quantize: held_out: expected a number of windows, got {held_out!r}")
    if held_out and report is None:
        raise ValueError(
            f"quantize: held_out: expected None or 0 without report, which says what is measured "
            f"on them, got {held_out}"
        )
    return held_out


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Configuration and weights as a folder; not by `save_pretrained`, which would set values in
    the caller's configuration and refuse generation settings that nothing here uses."""
    from resq_kernels.ptq.float_folder import untied, write_folder

    settings = json.loads(model.config.to_json_string())
    settings["dtype"] = dtype_name(model.dtype)
    tensors, settings["tie_word_embeddings"] = untied(model.state_dict())
    folder.mkdir()
    write_folder(folder, settings, tensors.items())


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Switches the bars of transformers off if they are not wanted."""
    from transformers.utils import logging

    on = logging.is_progress_bar_enabled()
    if not wanted:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            logging.enable_progress_bar()


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


def from_pretrained(
    path: str | Path, *, lo_bits: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` of a quantized folder, refusing any other.

    Args:
        path: a folder that `resq quantize` or `save_pretrained` wrote, or a name on the hub.
        lo_bits: bits of the low part of the activations, 4 or 8, by default what the model was
            quantized for. 8 halves the divergence from the 16-bit model; what it costs, by device:
            docs/cli.md. `save_pretrained` keeps it.
        kwargs: for transformers, such as `dtype`, `device_map` or `distributed_config`.

    Raises:
        TypeError, ValueError: the model is not quantized with ResQ; or `lo_bits` is not 4 or 8, or
            is given together with `config`, which has a value of its own.
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
        # transformers has errors of its own for some of these faults. Values are checked later.
        checkpoint.open_folder(folder, variant=kwargs.get("variant"))
    if lo_bits is not None:
        if kwargs.get("config") is not None:
            raise ValueError(
                f"from_pretrained: lo_bits: expected None together with config, got {lo_bits}; set "
                'config.quantization_config["lo_bits"]'
            )
        changed = checkpoint.with_lo_bits(entry, lo_bits)
        # Keywords that name a field of the configuration change it, as they do without one.
        config, unused = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k in unused or not hasattr(config, k)}
        config.quantization_config = changed
        kwargs["config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)
