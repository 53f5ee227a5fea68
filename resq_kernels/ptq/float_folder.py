"""A source that is no folder of 16-bit safetensors, turned into one: pickles, GGUF, quantized.

The folder lies in OUT.source, beside OUT, under the source's own name, appears complete, by a
rename, and goes when OUT is written. A run that is interrupted after the conversion keeps it.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resq_kernels.architecture import EMBEDDING, HEAD, ModelShape
from resq_kernels.ptq import dequantized, inputs
from resq_kernels.ptq.card import CARD
from resq_kernels.ptq.check import check_disk
from resq_kernels.ptq.gguf_file import GgufFile, is_gguf
from resq_kernels.ptq.save import companions
from resq_kernels.ptq.workspace import INPUTS_FILE, LOCK_FILE, Workspace, work_folder
from resq_kernels.safetensors_io import (
    CheckpointError,
    ShardWriter,
    check_content,
    dtype_name,
    find_weights,
    indexed_files,
    read_json,
    write_json,
)

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What `resq quantize` is given.

    Attributes:
        path: a folder, or a GGUF file.
        tokenizer: of a GGUF file, the folder whose files come beside the weights instead of those
            that the file's header describes.
    """

    path: Path
    tokenizer: Path | None = None

    @property
    def kind(self) -> str:
        """How it is read: "gguf", "quantized", "pickles", or "plain", which needs no conversion."""
        if is_gguf(self.path):
            return "gguf"
        config = read_json(self.path / "config.json")
        if config.get("quantization_config") is not None:
            return "quantized"
        found = find_weights(self.path, config)
        return "pickles" if found is not None and ".bin" in found.suffixes else "plain"

    def files(self) -> list[Path]:
        """Everything that the converted folder depends on."""
        if self.kind == "gguf":
            return [self.path, *(self.beside() if self.tokenizer else [])]
        config = read_json(self.path / "config.json")
        found = find_weights(self.path, config)
        if found is None:
            raise CheckpointError(f"{self.path}: holds no weights that transformers loads")
        weights = [found, *indexed_files(found)] if found.suffix == ".json" else [found]
        for path in weights:
            if not path.is_file():
                raise CheckpointError(f"{path}: expected a file of weights, found nothing")
        return [self.path / "config.json", *weights, *self.beside()]

    def beside(self) -> list[Path]:
        """The files of a folder that are copied beside the weights."""
        folder = self.tokenizer or self.path
        extra = (folder / name for name in (CARD, ADAPTER))
        return [*companions(folder), *filter(Path.is_file, extra)]

    @property
    def name(self) -> Path:
        """The converted folder's, below OUT.source, from which `card.source_name` makes that of the
        source."""
        if self.kind == "gguf":
            return Path(self.path.stem)
        parts = self.path.resolve().parts
        cached = len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
        return Path(*parts[-3:]) if cached else Path(parts[-1])


def source_root(out: Path) -> Path:
    """OUT.source."""
    return out.with_name(f"{out.name}.source")


def check_root(out: Path) -> None:
    """Refuses an OUT.source that is not what a conversion leaves. Nothing is written.

    Raises:
        FileExistsError: it holds other files, or is none.
    """
    root = source_root(out)
    if not os.path.lexists(root):
        return
    ours = root.is_dir() and not root.is_symlink()
    if not ours or (any(root.iterdir()) and not (root / LOCK_FILE).exists()):
        raise FileExistsError(
            f"{root}: expected the converted source of an interrupted quantization, got other "
            "files; move them away"
        )


@contextmanager
def float_folder(source: Source, out: Path, shape: ModelShape, resume: bool) -> Iterator[Path]:
    """The source as a folder of 16-bit or float32 safetensors, while it is being quantized.

    Args:
        source: what is quantized; a plain folder passes unchanged.
        out: the folder that is being written, links followed.
        shape: the model's sizes.
        resume: use the converted folder of an interrupted run.

    Raises:
        ValueError, ImportError: the source is damaged, or cannot be read here.
        FileExistsError: another process has OUT.source, or, with `resume`, the source has changed.
        OSError: not enough disk.
    """
    if source.kind == "plain":
        yield source.path
        return
    check_root(out)
    work = Workspace(source_root(out))
    work.root.mkdir(parents=True, exist_ok=True)
    work.lock()
    folder = work.root / source.name
    begun = work_folder(out) / INPUTS_FILE
    try:
        _convert_once(source, folder, work, out, shape, resume and begun.exists())
        with named_as(folder, str(source.path)), _warnings_name(folder, str(source.path)):
            yield folder
        _forget(work)
    except BaseException:
        if not begun.exists():
            _forget(work)
        raise
    finally:
        work.close()


@contextmanager
def named_as(folder: Path, name: str) -> Iterator[None]:
    """Gives errors that name a folder of which the user knows nothing the source's name."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(folder) not in str(error):
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(str(error).replace(str(folder), name)) from None


@contextmanager
def _warnings_name(folder: Path, name: str) -> Iterator[None]:
    """The same for warnings, as long as nobody else changes how they are shown."""
    shown = warnings.showwarning

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        shown(str(message).replace(str(folder), name), *rest, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _forget(work: Workspace) -> None:
    """Deletes the record, before the rest goes: what a kill leaves then does not pass for whole.

    A work folder without a record is removed when it is closed.
    """
    (work.root / INPUTS_FILE).unlink(missing_ok=True)


def _convert_once(
    source: Source, folder: Path, work: Workspace, out: Path, shape: ModelShape, begun: bool
) -> None:
    """Converts, unless the folder of an earlier run is there and of the same files.

    Raises:
        FileExistsError: the source has changed since the run that is being resumed.
    """
    record = work.root / INPUTS_FILE
    files = source.files()
    hashes = inputs.hashes(Path("/"), [path.absolute() for path in files])
    found = {"kind": source.kind, "files": hashes, "version": inputs.versions()}
    if record.exists():
        earlier = read_json(record)
        if earlier == found and folder.is_dir():
            return
        if begun and (changed := inputs.file_changes(earlier.get("files", {}), hashes)):
            raise FileExistsError(
                f"{source.path}: cannot resume, the interrupted run had other inputs: "
                f"{', '.join(changed)}; use the same ones, or remove {work_folder(out)} and "
                f"{work.root}"
            )
    _forget(work)
    work.clear()
    # float32 stays what it is, everything else has 16 bits then.
    halves = 2 * sum(map(math.prod, shape.source_tensors().values()))
    stored = sum(path.stat().st_size for path in files if path.is_file())
    check_disk(out, max(halves, stored), "the converted source")
    before = inputs.stamps(files)
    convert(source, folder)
    if changed := inputs.file_changes(before, inputs.stamps(filter(Path.exists, files))):
        raise ValueError(f"{', '.join(changed)} while it was being converted; begin again")
    write_json(record, found)


def convert(source: Source, folder: Path) -> None:
    """Writes the folder that a source stands for, which appears complete, by a rename.

    Args:
        source: one that is not plain.
        folder: must not exist.

    Raises:
        ValueError, ImportError: the source is damaged, or cannot be read here.
    """
    write = {"gguf": _write_gguf, "pickles": _write_pickles, "quantized": _write_quantized}
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    temporary.mkdir(parents=True)
    try:
        write[source.kind](source, temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(
    folder: Path, settings: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Configuration and weights into a folder that exists. Memory: a shard of 1 GB, or a tensor."""
    write_json(folder / "config.json", settings)
    writer = ShardWriter(folder)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()


def untied(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a model in memory without a head that is the embedding, and whether it was,
    whatever the configuration says."""
    tied = tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr()
    return {name: t for name, t in tensors.items() if not (tied and name == HEAD)}, tied


def _write_gguf(source: Source, folder: Path) -> None:
    from huggingface_hub import ModelCardData

    file = GgufFile(source.path)
    write_folder(folder, file.config, file.tensors())
    if source.tokenizer:
        _copy(source, folder)
    else:
        file.tokenizer().save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", file.generation)
    if not (folder / CARD).exists():
        header = ModelCardData(**file.header()).to_yaml()
        (folder / CARD).write_text(f"---\n{header}\n---\n", encoding="utf-8")


def _write_pickles(source: Source, folder: Path) -> None:
    config = read_json(source.path / "config.json")
    found = find_weights(source.path, config)
    assert found is not None  # or it would be of another kind
    files = indexed_files(found) if found.suffix == ".json" else [found]
    if not config.get("dtype") and not config.get("torch_dtype"):
        # As transformers resolves it; the order of tensors in a safetensors file is another.
        metadata = read_json(found).get("metadata") if found.suffix == ".json" else None
        named = metadata.get("dtype") if isinstance(metadata, dict) else None
        first = (t.dtype for _, t in _pickled(files[:1]) if t.is_floating_point())
        config["dtype"] = named or dtype_name(next(first, torch.float32))
    write_folder(folder, config, _pickled(files))
    _copy(source, folder)


def _pickled(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of pickles, one at a time in memory; a file of torch < 1.6 is read whole.

    Raises:
        CheckpointError: a file is missing or damaged, or holds something else than tensors.
    """
    for path in files:
        check_content(path)
        try:
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path}: expected weights that torch.save wrote, got a file that is damaged or "
                f"holds other objects ({text})"
            ) from error
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path}: expected tensors by name, got {type(content).__name__}")
        for name, tensor in content.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{path}: {name}: expected a tensor, got {type(tensor).__name__}"
                )
            # A copy: two names may have one storage, which a safetensors file cannot hold.
            yield str(name), tensor.detach().clone(memory_format=torch.contiguous_format)


def _write_quantized(source: Source, folder: Path) -> None:
    tensors, tied = untied(dequantized.load(source.path))
    config = read_json(source.path / "config.json")
    for key in ("quantization_config", "transformers_weights"):
        config.pop(key, None)
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = dtype_name(tensors[EMBEDDING].dtype)
    config["tie_word_embeddings"] = tied
    write_folder(folder, config, tensors.items())
    _copy(source, folder)


def _copy(source: Source, folder: Path) -> None:
    """The files beside the weights."""
    origin = source.tokenizer or source.path
    for path in source.beside():
        target = folder / path.relative_to(origin)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
