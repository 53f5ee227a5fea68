"""The quantized folder of docs/formats.md section 6: configuration, tensors, validation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resq_kernels import architecture
from resq_kernels.architecture import ModelShape, layer_prefix
from resq_kernels.config import ResQConfig
from resq_kernels.formats import FORMAT_VERSION, QuantizedWeight
from resq_kernels.safetensors_io import (
    FLOAT_DTYPES,
    CheckpointError,
    CheckpointReader,
    dtype_name,
    tensors_hash,
)

QUANT_METHOD = "resq"

_CONFIG_KEYS = (
    "method",
    "weights",
    "seed",
    "high_fraction",
    "hadamard_block",
    "lo_bits",
    "symmetric",
    "activation_clip",
    "kv_bits",
    "embedding_bits",
)
# Names that belong to the model; others in a file are ignored.
_OURS = re.compile(r"model\.(layers\.\d+|embed_tokens)\.|lm_head\.")
# Format -> the values that it and older ones, which had no such keys, stand for.
_OLDER = {1: {"embedding_bits": 16, "tied_head": False}, 4: {"hadamard_block": 0}}


class StoredFormat(NamedTuple):
    """What a `quantization_config` says about the tensors of its folder.

    Attributes:
        config: the options that it was made with; those of calibration, bases, GPTQ and
            distillation are not stored.
        tied_head: whether the head reads the embedding's matrix.
        version: `format_version`.
    """

    config: ResQConfig
    tied_head: bool
    version: int = FORMAT_VERSION

    @property
    def has_basis(self) -> bool:
        """Whether the rotation of the hidden states is stored."""
        return self.version >= 3 and self.config.has_basis

    @property
    def has_linear_bases(self) -> bool:
        """Whether what the bases of the linears take besides that is stored."""
        return self.version >= 6 and self.config.has_basis

    @property
    def has_guard(self) -> bool:
        """Whether there is an empty tensor that stops loaders which do not know the format."""
        return self.version >= 3


class QuantizedFolder(NamedTuple):
    """A folder that `open_folder` has checked.

    Attributes:
        reader: its tensors, under the names of a language model's.
        stored: what its `quantization_config` says.
        names: the tensors that make the model, in the order of docs/formats.md section 6.
    """

    reader: CheckpointReader
    stored: StoredFormat
    names: list[str]


def quantization_config(
    config: ResQConfig, basis_hash: str, rotation_hash: str, tied_head: bool
) -> dict[str, object]:
    """The `quantization_config` of config.json: docs/formats.md section 6."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        **{key: getattr(config, key) for key in _CONFIG_KEYS},
        "weight_bits": [4, 8],
        "hadamard": config.rotates,
        "tied_head": tied_head,
        "basis_hash": basis_hash,
        "rotation_hash": rotation_hash,
    }


def parse_quantization_config(entry: Mapping[str, Any]) -> StoredFormat:
    """Reads the `quantization_config` of a quantized folder.

    Raises:
        CheckpointError: another method, a newer format, or a missing or impossible value.
    """
    if entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"quantization_config: quant_method: expected {QUANT_METHOD!r}, "
            f"got {entry.get('quant_method')!r}"
        )
    version = entry.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = "; a newer resq_kernels wrote this model" if newer else ""
        raise CheckpointError(
            f"quantization_config: format_version: expected 1 to {FORMAT_VERSION}, "
            f"got {version!r}{hint}"
        )
    entry = dict(entry)
    for last, values in _OLDER.items():
        if version <= last:
            entry = values | entry
    keys = (*_CONFIG_KEYS, "tied_head", "basis_hash", "rotation_hash")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise CheckpointError(
            f"quantization_config: {', '.join(missing)}: expected a value, got nothing"
        )
    try:
        config = ResQConfig(**{key: entry[key] for key in _CONFIG_KEYS})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"quantization_config: {error}") from error
    if version < 4 and config.activation_clip != 1.0:
        raise CheckpointError(
            f"quantization_config: activation_clip: expected 1 in format_version {version}, which "
            f"clipped the INT8 part too, got {config.activation_clip}; quantize the model again"
        )
    for key, expected in (("weight_bits", [4, 8]), ("hadamard", config.rotates)):
        if entry.get(key) != expected:
            raise CheckpointError(
                f"quantization_config: {key}: expected {expected}, got {entry.get(key)!r}"
            )
    tied = entry["tied_head"]
    if not isinstance(tied, bool) or (tied and config.embedding_bits != 8):
        raise CheckpointError(
            f"quantization_config: tied_head: expected false, or true with embedding_bits 8, "
            f"got {tied!r} with {config.embedding_bits}"
        )
    return StoredFormat(config, tied, version)


def with_lo_bits(entry: Mapping[str, Any], lo_bits: int) -> dict[str, Any]:
    """The `quantization_config` of the same tensors with activations in other bits.

    Args:
        entry: a `quantization_config`.
        lo_bits: as in `ResQConfig`.

    Raises:
        CheckpointError: as `parse_quantization_config`.
        TypeError, ValueError: `lo_bits` is not 4 or 8.
    """
    config = parse_quantization_config(entry).config.with_lo_bits(lo_bits)
    changed = {"lo_bits": config.lo_bits, "activation_clip": config.activation_clip}
    return {**entry, **changed}


def quantized_tensors(
    shape: ModelShape, stored: StoredFormat
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> (shape, allowed dtypes) of every tensor of a quantized folder.

    Raises:
        ValueError: a linear's columns do not split as `high_fraction` demands.
    """
    config, tied_head, _ = stored
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    if stored.has_guard:
        expected[architecture.GUARD] = ((0,), (torch.uint8,))
    if stored.has_basis:
        expected[architecture.BASIS_ROTATION] = ((shape.hidden, shape.hidden), (torch.float16,))
        expected[architecture.BASIS_GAIN] = ((shape.hidden,), FLOAT_DTYPES)

    if stored.has_linear_bases:
        heads, dim, width = shape.kv_heads, shape.head_dim, shape.intermediate
        for name, sizes in {
            "norm_gains": (len(architecture.NORMS), shape.hidden),
            "key_factors": (heads, dim // 2),
            "values": (heads, dim, dim),
            "intermediate_factors": (width,),
            "intermediate_order": (width,),
        }.items():
            kind = ((shape.layers, *sizes), (torch.float32,))
            expected[f"{architecture.BASIS_LINEARS}.{name}"] = kind

    def linear(stem: str, rows: int, k_lo: int, k_hi: int) -> None:
        expected[f"{stem}.weight_lo"] = ((rows, k_lo // 2), (torch.uint8,))
        expected[f"{stem}.weight_hi"] = ((rows, k_hi), (torch.int8,))
        expected[f"{stem}.weight_scale"] = ((rows, 2), (torch.float32,))

    if config.embedding_bits == 8:
        linear(architecture.EMBEDDING_MODULE, shape.vocab, 0, shape.hidden)
        if not tied_head:
            linear(architecture.HEAD_MODULE, shape.vocab, 0, shape.hidden)
        elif config.has_basis:
            expected[architecture.HEAD_GAIN] = ((shape.hidden, shape.hidden), FLOAT_DTYPES)
    else:
        for name in (architecture.EMBEDDING, architecture.HEAD):
            expected[name] = ((shape.vocab, shape.hidden), FLOAT_DTYPES)
    expected[architecture.FINAL_NORM] = ((shape.hidden,), FLOAT_DTYPES)
    for layer in range(shape.layers):
        prefix = layer_prefix(layer)
        for name, width in shape.norms.items():
            expected[f"{prefix}{name}.weight"] = ((width,), FLOAT_DTYPES)
        for name in architecture.LINEARS:
            rows, columns = shape.linear(name)
            k_hi = shape.k_hi(name, config)
            linear(prefix + name, rows, columns - k_hi, k_hi)
        for name in shape.biased:
            expected[f"{prefix}{name}.bias"] = ((shape.linear(name)[0],), FLOAT_DTYPES)
        if config.has_basis:
            rotation = (1, shape.head_dim, shape.head_dim)
            expected[prefix + architecture.KEY_ROTATION] = (rotation, (torch.float16,))
    return expected


def validate(
    folder: Path | str,
    files: Iterable[Path | str] | None = None,
    variant: str | None = None,
    needs_head: bool = True,
) -> ResQConfig:
    """Checks a quantized folder before anything is built from it.

    Args:
        folder, files, variant, needs_head: as `open_folder` takes them.

    The checks are those of `open_folder` and of `check_values`.

    Returns:
        The options that it was made with, but for those of calibration, bases, GPTQ and
        distillation, which are not stored.

    Raises:
        CheckpointError: one sentence that names the tensor, what was expected and what was found.
    """
    opened = open_folder(folder, files, variant, needs_head)
    check_values(opened)
    return opened.stored.config


def open_folder(
    folder: Path | str,
    files: Iterable[Path | str] | None = None,
    variant: str | None = None,
    needs_head: bool = True,
) -> QuantizedFolder:
    """Opens a quantized folder and checks all of it but the values of its tensors.

    Args:
        folder: the folder.
        files: its weight files, if a loader has chosen them; by default those of `weight_files`.
        variant: as `from_pretrained` takes it.
        needs_head: whether the model has an lm_head. Without one, the folder may be what
            `save_pretrained` of a model without one wrote; one that is there is checked.

    The checks cover config.json, the presence, shape and dtype of every tensor, and the size of
    every file.

    Raises:
        CheckpointError: as `validate`.
    """
    reader = CheckpointReader(folder, files, variant)
    entry = reader.config.get("quantization_config")
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{reader.folder}: config.json: quantization_config: expected an object, got {entry!r}"
        )
    stored = parse_quantization_config(entry)
    try:
        shape = ModelShape.from_config(reader.config)
        expected = quantized_tensors(shape, stored)
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from error
    if shape.tied:
        raise CheckpointError(
            f"{reader.folder}: config.json: tie_word_embeddings: expected false, got true"
        )
    prefix = architecture.DECODER_PREFIX
    if architecture.FINAL_NORM.removeprefix(prefix) in reader:  # transformers saved a decoder alone
        reader.tensors = {f"{prefix}{name}": info for name, info in reader.tensors.items()}
    head = f"{architecture.HEAD_MODULE}."
    if not needs_head and not any(name.startswith(head) for name in reader.tensors):
        expected = {name: kind for name, kind in expected.items() if not name.startswith(head)}
    for name, (size, dtypes) in expected.items():
        reader.check(name, size, dtypes)
    extra = sorted(n for n in reader.tensors if n not in expected and _OURS.match(n))
    if extra:
        raise CheckpointError(f"{reader.folder}: {extra[0]}: expected no such tensor, found one")
    return QuantizedFolder(reader, stored, list(expected))


def check_values(opened: QuantizedFolder) -> None:
    """Checks that all weight scales are finite and not negative, and the hash of the rotations.

    Raises:
        CheckpointError: as `validate`.
    """
    reader, stored, names = opened
    rotations = _rotations(names)
    scales = [name for name in names if name.endswith(".weight_scale")]
    tensors = dict(reader.load_each([*scales, *rotations]))
    for name in scales:
        _check_scale(reader.folder, name, tensors[name])
    _check_hash(
        reader.folder,
        [tensors[name] for name in rotations],
        reader.config["quantization_config"]["rotation_hash"],
    )


def keep_rows(opened: QuantizedFolder, index: int, count: int) -> None:
    """Makes the reader of a folder read one part of the rows of every quantized weight, no other.

    Args:
        opened: the folder.
        index, count: which of how many equal parts; `count` divides the rows of all of them.
    """
    tensors = opened.reader.tensors
    for name in opened.names:
        if name.rpartition(".")[2] in QuantizedWeight._fields:
            whole = tensors[name]
            size, shape = whole.bytes // count, (whole.shape[0] // count, *whole.shape[1:])
            start = whole.start + index * size
            tensors[name] = dataclasses.replace(whole, shape=shape, start=start, bytes=size)


def checked(
    weights: Iterable[tuple[str, torch.Tensor]],
    shape: ModelShape,
    entry: Mapping[str, Any],
    where: Path | str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model with a head that another program's loader reads, checked on the way.

    The checks are those of `open_folder` and `check_values`. The guard, which no module holds, is
    left out.

    Args:
        weights: every tensor of the folder by its name, in any order.
        shape: the sizes of the model.
        entry: the `quantization_config`.
        where: the folder, for messages.

    Raises:
        CheckpointError: as `validate`; what is missing is known after the last tensor.
    """
    expected = quantized_tensors(shape, parse_quantization_config(entry))
    missing = dict.fromkeys(expected)
    rotations = dict.fromkeys(_rotations(expected), torch.empty(0))
    for name, tensor in weights:
        if name not in expected:
            if _OURS.match(name):
                raise CheckpointError(f"{where}: {name}: expected no such tensor, found one")
            continue
        size, dtypes = expected[name]
        if tensor.shape != size or tensor.dtype not in dtypes:
            kinds = " or ".join(dtype_name(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{where}: {name}: expected {kinds} {list(size)}, got "
                f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
        missing.pop(name, None)
        if name.endswith(".weight_scale"):
            _check_scale(where, name, tensor)
        if name in rotations:
            rotations[name] = tensor
        if name != architecture.GUARD:
            yield name, tensor
    for name in missing:
        raise CheckpointError(f"{where}: {name}: expected a tensor, found nothing")
    _check_hash(where, rotations.values(), entry["rotation_hash"])


def _rotations(names: Iterable[str]) -> list[str]:
    """The tensors of `rotation_hash`, of all tensors of a folder in their order."""
    names = list(names)
    keys = [name for name in names if name.endswith(architecture.KEY_ROTATION)]
    return keys + [name for name in names if name == architecture.BASIS_ROTATION]


def _check_scale(where: Path | str, name: str, scale: torch.Tensor) -> None:
    smallest, largest = (extreme.item() for extreme in scale.aminmax())
    if not (smallest >= 0 and largest < math.inf):  # both are NaN if one scale is
        got = smallest if smallest < 0 else largest
        raise CheckpointError(f"{where}: {name}: expected finite scales, got {got}")


def _check_hash(where: Path | str, rotations: Iterable[torch.Tensor], expected: str) -> None:
    hashed = tensors_hash(rotations)
    if hashed != expected:
        raise CheckpointError(
            f"{where}: self_attn.key_rotation or embed_tokens.basis.rotation: expected the "
            f"hash {expected}, got {hashed}"
        )
