"""The files of a Hugging Face folder: lazy reading and atomic writing of safetensors and JSON.

Every fault of a folder is reported by one `CheckpointError` sentence that names the file or tensor,
what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The words of a safetensors header. It knows others (F4, F6_E2M3, ...) that torch has no dtype for.
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class CheckpointError(ValueError):
    """A model folder or file that is missing, damaged or not as expected."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored.

    Attributes:
        file: the safetensors file.
        name: its name there.
        kind: its dtype in the file's own word, such as "BF16".
        shape: sizes.
        start: where the data begins in the file.
        bytes: size of the data.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CheckpointError: torch has none for `kind`.
        """
        if self.kind not in _DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name}: expected a dtype of torch, got {self.kind}"
            )
        return _DTYPES[self.kind]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        check_content(path)
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


def check_content(path: Path) -> None:
    """Refuses the pointer that git-lfs leaves in place of a file that it has not downloaded.

    Raises:
        CheckpointError: it is one; the message says what to run.
    """
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path}: expected the file, got a git-lfs pointer to it; run `git lfs pull` in "
                f"{path.parent}"
            )


def check_pointers(folder: Path) -> None:
    """Refuses a cloned folder whose configuration, tokenizer or weights are pointers of git-lfs.

    Raises:
        CheckpointError: names the first, and what to run.
    """
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    for path in (folder / "config.json", fast if fast.exists() else slow):
        if path.is_file():
            check_content(path)
    config = read_json(folder / "config.json")
    found = find_weights(folder, config)
    if found is not None:
        pickles = ".bin" in found.suffixes
        for path in [found] if pickles else weight_files(folder, config):
            if path.is_file():
                check_content(path)


def find_weights(
    folder: Path, config: Mapping[str, Any], variant: str | None = None
) -> Path | None:
    """The file or index of weights that `from_pretrained(folder)` of transformers 5.24 takes.

    Formula: what `transformers_weights` in config.json names, else the first that exists of
    model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json
    (with a variant V: model.V.safetensors, ...). All other files are ignored, an index that lies
    beside a single file among them.

    Args:
        folder: a model folder.
        config: the content of its config.json.
        variant: as `from_pretrained` takes it.

    Returns:
        A path that exists, or what `transformers_weights` names, or None.

    Raises:
        CheckpointError: `transformers_weights` names no safetensors file or index of the folder.
    """
    named = config.get("transformers_weights")
    if named is not None:
        # Links are not followed: the hub's cache keeps the files of a folder elsewhere.
        root = os.path.abspath(folder)
        inside = isinstance(named, str) and os.path.abspath(folder / named).startswith(
            root + os.sep
        )
        if not inside or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{folder}: config.json: transformers_weights: expected a safetensors file or "
                f"index in the folder, got {named!r}"
            )
        return folder / str(named)
    paths = (folder / name for name in weight_names(variant))
    return next(filter(Path.is_file, paths), None)


def weight_names(variant: str | None = None) -> tuple[str, ...]:
    """The files and indices of weights that transformers looks for, in its order."""
    suffix = f".{variant}" if variant else ""
    return (
        f"model{suffix}.safetensors",
        f"model.safetensors.index{suffix}.json",
        f"pytorch_model{suffix}.bin",
        f"pytorch_model.bin.index{suffix}.json",
    )


def weight_files(folder: Path, config: Mapping[str, Any], variant: str | None = None) -> list[Path]:
    """The safetensors files of `find_weights`: one, or those that its index lists, in their order.

    Raises:
        CheckpointError: there are none, they are pickles, or the index is damaged.
    """
    found = find_weights(folder, config, variant)
    wanted = f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}"
    if found is None:
        of = f" of variant {variant!r}" if variant else ""
        raise CheckpointError(f"{wanted}{of}, found neither")
    if ".bin" in found.suffixes:
        raise CheckpointError(f"{wanted}, got {found.name}")
    return indexed_files(found) if found.suffix == ".json" else [found]


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights lists, in their order.

    Raises:
        CheckpointError: the index is damaged.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map: expected tensor -> file, got {names!r}")
    for tensor, name in names.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: weight_map: {tensor}: expected a file, got {name!r}")
    return [index.parent / name for name in sorted(set(names.values()))]


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The table of a safetensors file, checked against the file's size."""
    try:
        check_content(path)
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
        infos = {}
        for name, entry in table.items():
            (start, stop), kind, shape = (entry[k] for k in ("data_offsets", "dtype", "shape"))
            whole = all(isinstance(number, int) for number in (start, stop, *shape))
            if not whole or not isinstance(kind, str):
                raise ValueError(f"{name}: {entry}")
            place = 8 + length + start
            infos[name] = TensorInfo(path, name, kind, tuple(shape), place, stop - start)
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

    Args:
        folder: the folder.
        files: its weight files, if a loader has chosen them; by default those of `weight_files`.
        variant: as `from_pretrained` takes it.

    Attributes:
        folder: the folder.
        config: the content of config.json.
        files: the safetensors files that make the model.
        tensors: name -> `TensorInfo` of everything stored in them. Where two files hold a name the
            later one counts, as in transformers.

    Raises:
        CheckpointError: the folder, config.json or a file of weights is missing, truncated or
            damaged.
    """

    def __init__(
        self,
        folder: Path | str,
        files: Iterable[Path | str] | None = None,
        variant: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: expected a model folder, found no folder")
        self.config = read_json(self.folder / "config.json")
        self.files = (
            weight_files(self.folder, self.config, variant)
            if files is None
            else [Path(file) for file in files]
        )
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self.tensors.update(_read_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which `from_pretrained` of transformers loads the model by default.

        Formula: `dtype` of config.json, or its older name `torch_dtype`; else that of the index's
        metadata; else that of the first floating tensor of the first file.

        Raises:
            CheckpointError: it is none of `FLOAT_DTYPES`.
        """
        found = find_weights(self.folder, self.config)
        indexed = found is not None and found.suffix == ".json"
        metadata = read_json(found).get("metadata") if found is not None and indexed else None
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is None and isinstance(metadata, dict):
            named = metadata.get("dtype")
        if named is None:
            named = self._first_dtype()
        for dtype in FLOAT_DTYPES:
            if named == dtype_name(dtype):
                return dtype
        expected = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES)
        raise CheckpointError(
            f"{self.folder}: config.json: dtype: expected one of {expected}, got {named!r}"
        )

    def _first_dtype(self) -> str | None:
        """The dtype of the first floating tensor of the first file, in safetensors' order."""
        try:
            with safe_open(self.files[0], framework="pt") as stream:
                kinds = [stream.get_slice(name).get_dtype() for name in stream.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{self.files[0]}: {error}") from error
        floating = (kind for kind in kinds if kind in ("BF16", "F16", "F32", "F64"))
        return next((dtype_name(_DTYPES[kind]) for kind in floating), None)

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
        [(_, tensor)] = self.load_each([name])
        return tensor

    def load_each(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as `load` reads them, with their names; opens, and parses, every file once."""
        with ExitStack() as stack:
            streams: dict[Path, Any] = {}
            for name in names:
                info = self.info(name)
                if info.file not in streams:
                    streams[info.file] = stack.enter_context(safe_open(info.file, framework="pt"))
                yield name, streams[info.file].get_tensor(info.name)

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start <= row < stop of a matrix, in its stored dtype."""
        info = self.info(name)
        with safe_open(info.file, framework="pt") as stream:
            rows: torch.Tensor = stream.get_slice(info.name)[start:stop]
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
        dtype = _DTYPES.get(info.kind)
        if info.shape != shape or dtype not in dtypes:
            expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
            got = info.kind if dtype is None else dtype_name(dtype)
            raise CheckpointError(
                f"{self.folder}: {info.name}: expected {expected} {list(shape)}, "
                f"got {got} {list(info.shape)}"
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
