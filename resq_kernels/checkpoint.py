"""Hugging Face folders of safetensors: lazy reading, atomic writing, and what ours must hold.

docs/formats.md section 6 states the quantized folder. Whatever is wrong with a folder is reported
by one `CheckpointError` sentence: which file or tensor, what was expected, what came.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from resq_kernels import architecture
from resq_kernels.architecture import ModelShape, layer_prefix
from resq_kernels.config import ResQConfig
from resq_kernels.formats import FORMAT_VERSION

QUANT_METHOD = "resq"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_CONFIG_KEYS = (
    "method",
    "weights",
    "seed",
    "high_fraction",
    "lo_bits",
    "symmetric",
    "activation_clip",
    "kv_bits",
    "embedding_bits",
)
# What folders of format 1, which had neither key, mean.
_FORMAT_1 = {"embedding_bits": 16, "tied_head": False}
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A folder that cannot be read as what it should be."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored.

    Attributes:
        file: the safetensors file.
        dtype: a torch dtype.
        shape: sizes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, found nothing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object under a temporary name, then moves it into place."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then moves it into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file under a temporary name, then moves it into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"format": "pt"},
    )
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o644)
    os.replace(temporary, path)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The table of a safetensors file, checked against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if length <= size - 8 else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a safetensors file, found nothing") from None
    if size < 8 or len(header) < length:
        expected = 8 + (length if size >= 8 else 0)
        raise CheckpointError(
            f"{path}: truncated: expected a header of {expected} bytes, got a file of {size}"
        )
    try:
        table = json.loads(header)
        table.pop("__metadata__", None)
        infos = {
            name: TensorInfo(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in table.items()
        }
        end = 8 + length + max((e["data_offsets"][1] for e in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a safetensors header, got {error!r}") from error
    if end != size:
        last = max(table, key=lambda name: table[name]["data_offsets"][1], default="the header")
        state = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{path}: {state}: expected {end} bytes up to the end of {last}, got {size}"
        )
    return infos


class CheckpointReader:
    """Reads one tensor at a time of a folder with config.json and safetensors files.

    Attributes:
        folder: the folder.
        config: the content of config.json.
        tensors: name -> `TensorInfo` of everything stored.

    Raises:
        CheckpointError: the folder, config.json or a file of weights is missing, truncated or
            damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: expected a model folder, found no folder")
        self.config = read_json(self.folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self.files = self._weight_files()
        for file in self.files:
            self.tensors.update(_read_header(file))

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.exists():
            names = read_json(index).get("weight_map", {}).values()
            return [self.folder / name for name in sorted(set(names))]
        if (self.folder / SINGLE_FILE).exists():
            return [self.folder / SINGLE_FILE]
        raise CheckpointError(
            f"{self.folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither"
        )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is.

        Raises:
            CheckpointError: the folder does not hold it.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: {name}: expected a tensor, found nothing")
        return self.tensors[name]

    def load(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored dtype."""
        with safe_open(self.info(name).file, framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
        return tensor

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start <= row < stop of a matrix, in its stored dtype."""
        with safe_open(self.info(name).file, framework="pt") as stream:
            rows: torch.Tensor = stream.get_slice(name)[start:stop]
        return rows

    def check(
        self, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype] = FLOAT_DTYPES
    ) -> None:
        """Compares a tensor's shape and dtype with what they must be.

        Raises:
            CheckpointError: missing, or another shape or dtype.
        """
        info = self.info(name)
        dtypes = tuple(dtypes)
        if info.shape != shape or info.dtype not in dtypes:
            expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{self.folder}: {name}: expected {expected} {list(shape)}, "
                f"got {dtype_name(info.dtype)} {list(info.shape)}"
            )


class ShardWriter:
    """Collects tensors and writes them as shards of at most `max_bytes`, then the index.

    A folder with one shard is a plain model.safetensors. Nothing bears its final name before
    `finish`. Memory: one shard.
    """

    def __init__(self, folder: Path, max_bytes: int = 1 << 30) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queues one tensor; writes a shard when the queue is full."""
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def add_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Queues several tensors by name."""
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.unfinished"
        save_tensors(path, self._pending)
        self._shards.append((path, list(self._pending)))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> int:
        """Gives the shards their names and writes the index; the bytes of all tensors."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            single = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, self.folder / single)
            weight_map.update(dict.fromkeys(names, single))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
        return self._total


def tensors_hash(tensors: Iterable[torch.Tensor]) -> str:
    """The hash of the bytes of tensors in order: "sha256:" and hex digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return f"sha256:{digest.hexdigest()}"


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


def parse_quantization_config(entry: Mapping[str, Any]) -> tuple[ResQConfig, bool]:
    """The options that a quantized folder was made with, and whether its head is tied.

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
    entry = (_FORMAT_1 if version == 1 else {}) | dict(entry)
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
    return config, tied


def quantized_tensors(
    shape: ModelShape, config: ResQConfig, tied_head: bool
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> (shape, allowed dtypes) of every tensor of a quantized folder.

    Raises:
        ValueError: a linear's columns do not split as `high_fraction` demands.
    """
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}

    def linear(stem: str, rows: int, k_lo: int, k_hi: int) -> None:
        expected[f"{stem}.weight_lo"] = ((rows, k_lo // 2), (torch.uint8,))
        expected[f"{stem}.weight_hi"] = ((rows, k_hi), (torch.int8,))
        expected[f"{stem}.weight_scale"] = ((rows, 2), (torch.float32,))

    if config.embedding_bits == 8:
        linear(architecture.EMBEDDING_MODULE, shape.vocab, 0, shape.hidden)
        if not tied_head:
            linear(architecture.HEAD_MODULE, shape.vocab, 0, shape.hidden)
        elif config.rotates:
            expected[architecture.HEAD_GAIN] = ((shape.hidden, shape.hidden), FLOAT_DTYPES)
    else:
        for name in (architecture.EMBEDDING, architecture.HEAD):
            expected[name] = ((shape.vocab, shape.hidden), FLOAT_DTYPES)
    expected[architecture.FINAL_NORM] = ((shape.hidden,), FLOAT_DTYPES)
    for layer in range(shape.layers):
        prefix = layer_prefix(layer)
        for name in architecture.NORMS:
            expected[f"{prefix}{name}.weight"] = ((shape.hidden,), FLOAT_DTYPES)
        for name in architecture.LINEARS:
            rows, columns = shape.linear(name)
            k_hi = shape.k_hi(name, config.high_fraction)
            linear(prefix + name, rows, columns - k_hi, k_hi)
        for name in architecture.QKV if shape.qkv_bias else ():
            expected[f"{prefix}{name}.bias"] = ((shape.linear(name)[0],), FLOAT_DTYPES)
        if config.rotates:
            rotation = (1, shape.head_dim, shape.head_dim)
            expected[prefix + architecture.KEY_ROTATION] = (rotation, (torch.float16,))
    return expected


def validate(folder: Path | str) -> ResQConfig:
    """Checks a quantized folder before anything is built from it.

    config.json, the presence, shape and dtype of every tensor, the size of every file, that all
    weight scales are finite and not negative, and the hash of the key rotations.

    Returns:
        The options that it was made with (`samples`, `seqlen` and `damping` are not stored).

    Raises:
        CheckpointError: one sentence that names the tensor, what was expected and what came.
    """
    reader = CheckpointReader(folder)
    entry = reader.config.get("quantization_config")
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{reader.folder}: config.json: quantization_config: expected an object, got {entry!r}"
        )
    config, tied_head = parse_quantization_config(entry)
    try:
        shape = ModelShape.from_config(reader.config)
        expected = quantized_tensors(shape, config, tied_head)
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}") from error
    if shape.tied:
        raise CheckpointError(
            f"{reader.folder}: config.json: tie_word_embeddings: expected false, got true"
        )
    for name, (size, dtypes) in expected.items():
        reader.check(name, size, dtypes)
    ours = re.compile(r"model\.layers\.\d+\.|model\.embed_tokens\.|lm_head\.")
    extra = sorted(n for n in reader.tensors if ours.match(n) and n not in expected)
    if extra:
        raise CheckpointError(f"{reader.folder}: {extra[0]}: expected no such tensor, found one")
    for name in expected:
        if name.endswith(".weight_scale"):
            scales = reader.load(name)
            if not (torch.isfinite(scales) & (scales >= 0)).all():
                raise CheckpointError(
                    f"{reader.folder}: {name}: expected finite scales, got "
                    f"{scales[~(torch.isfinite(scales) & (scales >= 0))][0].item()}"
                )
    rotations = [reader.load(n) for n in expected if n.endswith(architecture.KEY_ROTATION)]
    got = tensors_hash(rotations)
    if got != entry["rotation_hash"]:
        raise CheckpointError(
            f"{reader.folder}: self_attn.key_rotation: expected the hash "
            f"{entry['rotation_hash']}, got {got}"
        )
    return config


def dtype_name(dtype: torch.dtype) -> str:
    """The name without torch: "float32"."""
    return str(dtype).removeprefix("torch.")
