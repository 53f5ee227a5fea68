"""The work folder OUT.partial: an interrupted quantization continues from it to the same bits.

Every finished piece is one safetensors file, written under a temporary name and moved into place;
a piece depends only on earlier pieces and on the inputs. The fingerprint of those inputs (model
files, calibration tokens, options, program version) is stored first and compared on resumption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

import resq_kernels
from resq_kernels.config import ResQConfig
from resq_kernels.safetensors_io import read_json, save_tensors, write_json

Piece = TypeVar("Piece")

FINGERPRINT_FILE = "fingerprint.json"
# Version of the pieces' content: a work folder of another version cannot be continued.
PIECES = 2
# Files up to 64 MiB are hashed whole; of larger ones, 64 blocks from the first byte to the last.
# Hashing 140 GB of weights takes a second, and a different model differs everywhere.
HASH_BLOCKS = 64
HASH_BLOCK_BYTES = 1 << 20


def fingerprint(
    files: Iterable[Path], calibration: torch.Tensor, config: ResQConfig
) -> dict[str, str]:
    """Hashes of everything that the result depends on.

    Args:
        files: config.json and the weight files of the source model.
        calibration: token windows.
        config: the options.

    Returns:
        "model", "calibration", "config" and "version" -> a value that changes with it.
    """
    model = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        model.update(f"{path.name} {size}\n".encode())
        last = max(0, size - HASH_BLOCK_BYTES)
        starts = {last * i // (HASH_BLOCKS - 1) for i in range(HASH_BLOCKS)}
        with path.open("rb") as stream:
            for start in sorted(starts):
                stream.seek(start)
                model.update(stream.read(HASH_BLOCK_BYTES))
    tokens = calibration.contiguous().numpy()
    return {
        "model": model.hexdigest(),
        "calibration": hashlib.sha256(str(tokens.shape).encode() + tokens.tobytes()).hexdigest(),
        "config": json.dumps(config.to_dict()),
        "version": f"{resq_kernels.__version__}, pieces {PIECES}, torch {torch.__version__}",
    }


def layer_piece(index: int) -> str:
    """The piece with the tensors of a quantized layer, under their names in a checkpoint."""
    return f"quantize-{index:05d}"


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

    @classmethod
    def open(cls, out: Path, inputs: Mapping[str, str], resume: bool) -> Workspace:
        """The work folder of an output folder, new or continued.

        Raises:
            FileExistsError: OUT exists, or OUT.partial exists and `resume` is off.
            ValueError: OUT.partial belongs to other inputs.
        """
        if out.exists():
            raise FileExistsError(f"{out}: expected a new folder, but it exists; remove it first")
        root = out.with_name(f"{out.name}.partial")
        record = root / FINGERPRINT_FILE
        if record.exists():
            if not resume:
                raise FileExistsError(
                    f"{root}: an interrupted quantization is here; resume it, or remove the folder"
                )
            before = read_json(record)
            changed = [key for key, value in inputs.items() if before.get(key) != value]
            if changed:
                raise ValueError(
                    f"{root}: cannot resume: it was begun with another {' and '.join(changed)}; "
                    "use the same inputs, or remove the folder"
                )
        else:
            # Without a fingerprint nothing was computed yet: the run was killed at its very start.
            root.mkdir(parents=True, exist_ok=True)
            write_json(record, inputs)
        return cls(root)

    def _path(self, piece: str) -> Path:
        return self.root / f"{piece}.safetensors"

    def has(self, piece: str) -> bool:
        """Whether a piece is finished."""
        return self._path(piece).exists()

    def load(self, piece: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished piece."""
        return load_file(self._path(piece))

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

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.root)


class HiddenStates:
    """float32 [windows, seqlen, hidden] in a memory-mapped file that appears when complete.

    Args:
        path: the file.
        shape: its sizes.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    def _map(self, path: Path) -> torch.Tensor:
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return torch.from_file(str(path), shared=True, size=size).view(self.shape)

    @property
    def exists(self) -> bool:
        """Whether they are finished."""
        return self.path.exists()

    def read(self) -> torch.Tensor:
        """The finished states, mapped."""
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
