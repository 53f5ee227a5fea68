"""Model folders and hub names into models and tokenizers, with errors that read well."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from resq_kernels.commands.output import CommandError, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from resq_kernels.ptq.gguf_file import GgufFile

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --dtype and --device, as `eval` and `generate` take them."""
    parser.add_argument(
        "model", metavar="MODEL", help="HF folder, hub name or GGUF file; 16-bit or quantized"
    )
    add_lo_bits_argument(parser)
    add_dtype_argument(parser)
    add_device_argument(parser)


def add_lo_bits_argument(parser: argparse.ArgumentParser) -> None:
    """--lo-bits, as every command that loads a quantized model takes it."""
    parser.add_argument(
        "--lo-bits",
        type=int,
        choices=(4, 8),
        help="of a quantized model: bits of the low part of its activations (default: what it was "
        "quantized for); 8 is nearer to the 16-bit model, and as fast on CPUs",
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """--dtype, as every command that loads a model takes it."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of everything that is not quantized (default: the checkpoint's own)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device, as every command takes it; `choose_device` has its default."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to run (default: cuda where its kernels run, else cpu)",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """--adapter, as every command that runs one model takes it."""
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="a LoRA adapter of peft, folder or hub name, that was trained on the float model or "
        "on a quantized one",
    )


def choose_device(asked: str | None) -> str:
    """The device that was asked for, or "cuda" where its kernels run, else "cpu".

    Raises:
        CommandError: CUDA was asked for and torch has none; `resq info` says why.
    """
    import torch

    from resq_kernels import _library

    works = torch.cuda.is_available()
    if asked is None:
        return "cuda" if works and not _library.CUDA_MISSING else "cpu"
    if asked == "cuda" and not works:
        raise CommandError("--device cuda: torch sees no CUDA device (`resq info` says why)")
    return asked


def load_config(model: str, lo_bits: int | None = None) -> PretrainedConfig:
    """The model's configuration.

    Args:
        model: a folder, hub name or GGUF file.
        lo_bits: bits of the activations' low part, instead of those it was quantized for.

    Raises:
        CommandError: the folder is missing, is no HF folder, or the hub does not have the name.
        UsageError: `lo_bits` is given for a model that is not quantized by resq.
        CheckpointError: as `parse_quantization_config`, if `lo_bits` is given.
    """
    config = _load_config(model)
    if lo_bits is not None:
        stored = quantization(config)
        if stored is None or stored.get("quant_method") != "resq":
            raise UsageError(f"--lo-bits: expected a model quantized by resq, got {model}")
        from resq_kernels.checkpoint import with_lo_bits

        config.quantization_config = with_lo_bits(stored, lo_bits)
    return config


def _load_config(model: str) -> PretrainedConfig:
    from transformers import AutoConfig

    _quiet()
    if not model:  # as a path, it would be the current folder
        raise CommandError("model: expected a folder or a hub name, got ''")
    folder = Path(model)
    if is_gguf(model):
        return open_gguf(model).transformers_config()
    if folder.exists():
        check_folder(folder)
    elif model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise CommandError(f"{model}: there is no such folder")
    else:
        sys.stderr.write(f"resq: no folder {model}, looking for it on the Hugging Face hub\n")
    try:
        # False: without it, a folder with code of its own makes transformers ask on the terminal.
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise CommandError(_why(model, error)) from error


def is_gguf(model: str) -> bool:
    """`gguf_file.is_gguf`, imported when a command runs: --help goes without torch."""
    from resq_kernels.ptq import gguf_file

    return gguf_file.is_gguf(model)


def open_gguf(model: str) -> GgufFile:
    """The file, opened once however often the model is asked for: its tokenizer takes seconds.

    Raises:
        CommandError, CheckpointError, ImportError: there is none, or it cannot be read here.
    """
    path = Path(model)
    if not path.exists():
        raise CommandError(f"{model}: there is no such file")
    status = path.stat()
    return _open_gguf(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Path, *stamp: int) -> GgufFile:
    from resq_kernels.ptq.gguf_file import GgufFile

    return GgufFile(path)


def check_folder(folder: Path) -> None:
    """Refuses what is not a Hugging Face model folder.

    Raises:
        CommandError: it is a file, or config.json is missing.
        CheckpointError: config.json is no JSON object, or a file is a pointer of git-lfs.
    """
    from resq_kernels.safetensors_io import check_pointers

    if not folder.is_dir():
        raise CommandError(f"{folder}: expected a model folder, got a file")
    config = folder / "config.json"
    if not config.is_file():
        raise CommandError(f"{folder}: not a Hugging Face model folder (no config.json)")
    check_pointers(folder)


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "cpu",
    lo_bits: int | None = None,
    adapter: str | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode; quantized folders run their kernels.

    Args:
        model, lo_bits: as `load_config` takes them.
        dtype: one of DTYPES.
        device: where it computes.
        adapter: a LoRA adapter of peft that is put on it.

    Raises:
        CommandError: as `load_config`, or the checkpoint or the adapter does not load; the message
            says why.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig

    if adapter is not None:
        _check_adapter(adapter)
    config = load_config(model, lo_bits)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    loader = AutoModelForCausalLM
    weights: dict[str, object] = {} if lo_bits is None else {"config": config}
    if is_gguf(model):
        file = open_gguf(model)
        kind = file.dtype if dtype == "auto" else kind
        loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        weights = {"config": config, "state_dict": dict(file.tensors())}
    try:
        loaded, report = loader.from_pretrained(
            None if "state_dict" in weights else model,
            dtype=kind,
            output_loading_info=True,
            **weights,
            # Not the folder's file: what it asks for may not even load. `generate` reads it.
            generation_config=GenerationConfig(
                **{name: getattr(config, name, None) for name in TOKEN_IDS}
            ),
        )
    except Exception as error:
        raise CommandError(_why(model, error)) from error
    # The library fills a missing tensor with random numbers and says so in a warning only.
    missing = sorted(report["missing_keys"])
    if missing:
        raise CommandError(
            f"{model}: the checkpoint lacks {missing[0]}"
            + (f" and {len(missing) - 1} other tensors" if len(missing) > 1 else "")
        )
    loaded.to(device)
    if adapter is not None:
        _load_adapter(loaded, adapter)
    return loaded.eval()


def _check_adapter(adapter: str) -> None:
    """Refuses what is not an adapter of peft, before a model is loaded.

    Raises:
        CommandError: peft is missing, or it is a folder of something else.
    """
    if not _installed("peft"):
        raise CommandError("--adapter: needs peft; run `pip install peft`")
    folder = Path(adapter)
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise CommandError(f"{adapter}: not a folder of a peft adapter (no adapter_config.json)")


def _load_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Puts an adapter of peft on a loaded model, and makes it the active one.

    Raises:
        CommandError: there is no such adapter, or it is another model's; the message says why.
    """
    try:
        report = model.load_adapter(adapter)
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):  # "see the above report", which is silenced
            raise CommandError(
                f"{adapter}: the adapter has tensors of other shapes than this model's"
            ) from error
        raise CommandError(_why(adapter, error)) from error
    # The library fills a missing tensor with what training begins with, and says so in a warning.
    for names, what in ((report.missing_keys, "lacks"), (report.unexpected_keys, "has an unknown")):
        if names:
            raise CommandError(f"{adapter}: the adapter {what} {min(names)}")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        CommandError: the folder holds none; the message says which files or package it lacks.
    """
    from transformers import AutoTokenizer

    if is_gguf(model):
        return open_gguf(model).tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        why = _tokenizer_lacks(model) or f"the tokenizer does not load: {error}"
        raise CommandError(f"{model}: {why}") from error
    # Some classes load without any file, and make no tokens of text.
    added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if set(tokenizer.get_vocab()) <= added:
        why = _tokenizer_lacks(model) or "its tokenizer has no words but special tokens"
        raise CommandError(f"{model}: {why}")
    return tokenizer


def _tokenizer_lacks(model: str) -> str:
    """The files or the package that a tokenizer lacks; "" if it has what it needs."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(model, name, _raise_exceptions_for_missing_entries=False)

    if find("tokenizer.json"):
        return ""
    if path := find("tokenizer.model"):
        # A SentencePiece model is a protobuf message; the other kind is lines of base64.
        with open(path, "rb") as stream:
            pieces = stream.read(1) == b"\n"
        modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        missing = [
            package
            for package, module in (modules if pieces else {"tiktoken": "tiktoken"}).items()
            if not _installed(module)
        ]
        names = " ".join(missing)
        return f"tokenizer.model: reading it needs `pip install {names}`" if missing else ""
    parts = ("vocab.json", "merges.txt")
    absent = [name for name in parts if not find(name)]
    if not absent:
        return ""
    got = "none of them" if len(absent) == 2 else f"no {absent[0]}"
    return (
        "no tokenizer: expected tokenizer.json, or tokenizer.model, or vocab.json and merges.txt, "
        f"got {got}; add the files of the model's repository"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that should contain it
        return False


def window_limit(config: PretrainedConfig) -> int | None:
    """The longest context that the model was made for, in tokens; None if it does not say."""
    return getattr(config, "max_position_embeddings", None)


def choose_seqlen(asked: int | None, config: PretrainedConfig, default: int = 2048) -> int:
    """The window that was asked for, or the papers' 2048 (less where the model is shorter).

    Raises:
        UsageError: the window is longer than the model's positions.
    """
    limit = window_limit(config)
    if asked is None:
        return default if limit is None else min(default, limit)
    if limit is not None and asked > limit:
        raise UsageError(
            f"--seqlen: expected at most {limit} (the model's max_position_embeddings), got {asked}"
        )
    return asked


def quantization(config: PretrainedConfig) -> dict[str, object] | None:
    """The `quantization_config` of a quantized checkpoint as plain values, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored) if isinstance(stored, dict) else dict(stored.to_dict())


def _why(model: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if Path(model).exists():
        return f"{model}: {text}"
    if isinstance(error, OSError):
        return f"{model}: neither a folder nor a model on the hub ({text})"
    return f"{model}: {text}"


def _quiet() -> None:
    """Silences the libraries on stderr: a failure is one sentence, progress bars are ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
