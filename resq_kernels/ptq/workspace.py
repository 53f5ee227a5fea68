"""The work folder OUT.partial: an interrupted quantization continues from it to the same bits.

Every finished piece is one safetensors file, written under a temporary name and moved into place;
a piece depends only on earlier pieces and on the inputs. Those inputs (ptq/inputs.py) are stored
first and compared on resumption. One process at a time holds the folder's lock.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from resq_kernels.ptq.inputs import changes
from resq_kernels.safetensors_io import CheckpointError, read_json, save_tensors, write_json

Piece = TypeVar("Piece")

INPUTS_FILE = "inputs.json"
LOCK_FILE = "lock"
REPORT_FILE = "quantization_report.json"
# What a run that was killed at its very start leaves: nothing was computed yet.
_EMPTY = {LOCK_FILE, f"{INPUTS_FILE}.tmp"}

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


def work_folder(out: Path) -> Path:
    """OUT.partial."""
    return out.with_name(f"{out.name}.partial")


def check_out(out: Path, resume: bool) -> Path:
    """The folder that OUT stands for, links followed; refuses what cannot become one.

    Nothing is written.

    Raises:
        FileExistsError: OUT exists and is not a finished folder to be resumed; or OUT.partial does
            and `resume` is off, or it is not a work folder, or it cannot be renamed to OUT.
    """
    target = Path(os.path.realpath(out))
    root = work_folder(target)
    if os.path.lexists(target) and not (resume and (target / REPORT_FILE).is_file()):
        raise FileExistsError(f"{out}: expected a new folder, but it exists; remove it first")
    if not os.path.lexists(root):
        return target
    if root.is_symlink() or not root.is_dir() or root.stat().st_dev != root.parent.stat().st_dev:
        raise FileExistsError(
            f"{root}: expected a folder on the file system of {root.parent}, got a link, a file "
            "or a mount; remove it first"
        )
    names = {path.name for path in root.iterdir()}
    if INPUTS_FILE not in names and names - _EMPTY:
        raise FileExistsError(
            f"{root}: expected the work folder of an interrupted quantization, got other files; "
            "move them away"
        )
    if INPUTS_FILE in names and not resume:
        raise FileExistsError(
            f"{root}: an interrupted quantization is here; resume it, or remove the folder"
        )
    return target


def layer_piece(index: int) -> str:
    """The piece with the tensors of a quantized layer, under their names in a checkpoint."""
    return f"quantize-{index:05d}"


LEARNED = "learned"
"""The piece with the learned bases, by the names of `Rotation`, and "losses", float64 [steps]."""
DISTILLED = "distilled"
"""The piece that says that the distillation is finished: "divergences", float64 [steps]."""


def distilled_piece(index: int) -> str:
    """The piece with the trained tensors of a layer, under their names in a checkpoint."""
    return f"distilled-{index:05d}"


def target_piece(index: int) -> str:
    """The piece with what a layer's INT8 columns were rounded from, in steps of their scale."""
    return f"targets-{index:05d}"


def error_piece(index: int) -> str:
    """The piece with the relative output error of each linear of a layer, float64 [1] by name."""
    return f"errors-{index:05d}"


class Workspace:
    """A work folder: named pieces, and files of hidden states.

    Args:
        root: the folder; `open` decides whether it may exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None

    @classmethod
    def open(cls, out: Path, resume: bool) -> Workspace:
        """The work folder of an output folder, locked until `close` or `remove`.

        Args:
            out: as `check_out` returns it.
            resume: whether the folder may hold the pieces of an interrupted run.

        Raises:
            FileExistsError: as `check_out`, or another process works here.
        """
        work = cls(work_folder(out))
        work.root.mkdir(parents=True, exist_ok=True)
        work.lock()
        try:
            check_out(out, resume)  # again, under the lock
        except BaseException:
            work.close()
            raise
        return work

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Keeps the inputs of a new run, or compares those of an interrupted one.

        Raises:
            FileExistsError: the pieces belong to other inputs; the message says which changed.
        """
        record = self.root / INPUTS_FILE
        if not record.exists():
            write_json(record, inputs)
        elif changed := changes(read_json(record), inputs):
            raise FileExistsError(
                f"{self.root}: cannot resume, the interrupted run had other inputs: {changed}; "
                "use the same ones, or remove the folder"
            )

    def lock(self) -> None:
        """Takes the folder for this process; the kernel gives it back when the process ends.

        Raises:
            FileExistsError: another process has it.
        """
        path = self.root / LOCK_FILE
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock may have removed the folder since.
            taken = not os.path.samestat(os.fstat(self._lock), path.stat())
        except (BlockingIOError, FileNotFoundError):
            taken = True
        except OSError as error:
            if self._lock is None or error.errno not in _NO_LOCKS:
                raise
            taken = False
            warnings.warn(
                f"{path}: cannot be locked ({error.strerror}); do not start a second process",
                stacklevel=2,
            )
        if taken:
            self._unlock()
            raise FileExistsError(
                f"{self.root}: another process is quantizing into this folder; wait for it, or "
                "choose another OUT"
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def close(self) -> None:
        """Gives the lock back; a folder in which nothing was begun goes too."""
        if self._lock is not None and not (self.root / INPUTS_FILE).exists():
            self.remove()
        self._unlock()

    def _path(self, piece: str) -> Path:
        return self.root / f"{piece}.safetensors"

    def has(self, piece: str) -> bool:
        """Whether a piece is finished."""
        return self._path(piece).exists()

    def load(self, piece: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished piece.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return load_file(self._path(piece))
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._path(piece)}: expected a finished piece, got a damaged file ({error}); "
                f"remove {self.root} and begin again"
            ) from error

    def save(self, piece: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a piece, which is then finished."""
        save_tensors(self._path(piece), tensors)

    def delete(self, piece: str) -> None:
        """Deletes a piece that is no longer needed."""
        self._path(piece).unlink(missing_ok=True)

    def stage(self, piece: str, kind: type[Piece], compute: Callable[[], Piece]) -> Piece:
        """The dataclass of tensors of a stage; runs `compute` and saves it if not finished."""
        if not self.has(piece):
            self.save(piece, vars(compute()))
        return kind(**self.load(piece))

    def hidden(self, piece: str, shape: tuple[int, int, int]) -> HiddenStates:
        """The hidden states named `piece`, [windows, seqlen, hidden]."""
        return HiddenStates(self.root / f"{piece}.f32", shape)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An unset tensor in a file that has no name: the system may write its pages to disk, and
        the disk's space is free again once the tensor is, or the process ends."""
        size = math.prod(shape)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        path = self.root / "scratch"
        tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        path.unlink()
        return tensor

    def clear(self) -> None:
        """Deletes all but the lock, the inputs last: what a kill leaves is still a work folder."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in (INPUTS_FILE, LOCK_FILE):
                path.unlink()
        (self.root / INPUTS_FILE).unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes what it can of the folder, the lock last, and gives the lock back."""
        with suppress(OSError):  # somebody has removed the folder
            self.clear()
        # Errors: a process that comes now puts its own lock into the folder, and removes it.
        shutil.rmtree(self.root, ignore_errors=True)
        self._unlock()


class HiddenStates:
    """float32 [windows, seqlen, hidden] in a memory-mapped file that appears when complete.

    Args:
        path: the file.
        shape: its sizes.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    def _map(self, path: Path) -> torch.Tensor:
        size = math.prod(self.shape)
        return torch.from_file(str(path), shared=True, size=size).view(self.shape)

    @property
    def exists(self) -> bool:
        """Whether they are finished."""
        return self.path.exists()

    def read(self) -> torch.Tensor:
        """The finished states, mapped.

        Raises:
            CheckpointError: the file has another size; mapping it would fill it up with zeros.
        """
        wanted, got = 4 * math.prod(self.shape), self.path.stat().st_size
        if got != wanted:
            raise CheckpointError(
                f"{self.path}: expected {wanted} bytes, got {got}; remove {self.path.parent} and "
                "begin again"
            )
        return self._map(self.path)

    def begin(self) -> torch.Tensor:
        """A mapping to fill; `finish` publishes it."""
        self._unfinished.unlink(missing_ok=True)
        return self._map(self._unfinished)

    def finish(self) -> None:
        """Renames the complete file to its final name."""
        with self._unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(self._unfinished, self.path)

    def delete(self) -> None:
        """Frees the space."""
        self.path.unlink(missing_ok=True)

    @property
    def _unfinished(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tmp")
