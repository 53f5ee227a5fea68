"""The files of a Hugging Face folder: lazy reading and atomic writing of safetensors and JSON.

Every fault of a folder is reported by one `CheckpointError` sentence that names the file or tensor,
what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

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
    """A model folder or file that is missing, damaged or not as expected."""


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
    """Reads a folder with config.json and safetensors files, one tensor at a time.

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

    A single shard becomes a plain model.safetensors. No file has its final name before `finish`.
    Memory: one shard.
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
        """Renames the shards and writes the index; returns the bytes of all tensors."""
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


def dtype_name(dtype: torch.dtype) -> str:
    """The name without torch: "float32"."""
    return str(dtype).removeprefix("torch.")
