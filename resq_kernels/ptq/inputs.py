"""What a result depends on, as hashes: `--resume` compares them and says what changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import resq_kernels
from resq_kernels.config import ResQConfig

if TYPE_CHECKING:
    from resq_kernels.ptq.dialogues import Dialogues

# Version of the pieces' content: a work folder of another version cannot be continued.
PIECES = 7
_BLOCK_BYTES = 1 << 22


def describe(
    folder: Path,
    files: Iterable[Path],
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    dialogues: Dialogues | None,
    config: ResQConfig,
    device: str,
) -> dict[str, Any]:
    """Everything that the result depends on.

    Args:
        folder: the source model's.
        files: those of its files that are read or copied.
        calibration: token windows.
        held_out: those of the verdict.
        dialogues: windows that the model writes.
        config: the options.
        device: where the layers are computed; its sums have an order of their own.

    Returns:
        "files" (name -> hash), "calibration" and "held_out" (hashes of the tokens), "dialogues"
        (a hash of their template and number), "config", "device", "version".
    """
    return {
        "files": hashes(folder, files),
        "calibration": _tokens(calibration),
        "held_out": _tokens(held_out),
        "dialogues": _hex(repr(dialogues).encode()),
        "config": config.to_dict(),
        "device": device,
        "version": versions(),
    }


def versions() -> str:
    """The versions of everything that decides the bits of a result."""
    return (
        f"resq_kernels {resq_kernels.__version__}, pieces {PIECES}, "
        f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    )


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name -> "sha256:..." of all bytes of each file.

    Nothing cheaper is kept beside them: size and time of a file can be what they were although its
    bytes are not (`cp -p`, `rsync -t`), and a core hashes 1.4 GB a second: 12 s for the 16 GB of
    an 8B model, which is read twice during the run anyway.
    """
    paths = sorted(files)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(_file, paths))
    return {
        str(path.relative_to(folder)): hashed for path, hashed in zip(paths, found, strict=True)
    }


def stamps(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> size, time and inode: what changes if a file is written during the run."""
    stats = {str(path): path.stat() for path in files}
    return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two results of `describe`, for a message; "" if nothing does."""
    found = file_changes(before.get("files", {}), now["files"])
    if before.get("calibration") != now["calibration"]:
        found.append("the calibration tokens (text, tokenizer, seqlen, samples or seed) differ")
    elif before.get("held_out") != now["held_out"]:
        found.append("the held-out tokens differ")
    if before.get("dialogues") != now["dialogues"]:
        found.append("the dialogues (chat template or their number) differ")
    found += _values(before.get("config", {}), now["config"])
    plain = ("device", "version")
    found += _values({k: before.get(k) for k in plain}, {k: now[k] for k in plain})
    return ", ".join(found)


def file_changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs between two results of `hashes` or `stamps`, for a message."""

    def change(name: str) -> str:
        return "is new" if name not in before else "is gone" if name not in now else "has changed"

    return [f"{name} {change(name)}" for name in _different(before, now)]


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted({*before, *now})
    return [name for name in names if before.get(name) != now.get(name)]


def _values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in _different(before, now)
    ]


def _file(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
    return f"sha256:{digest.hexdigest()}"


def _tokens(windows: torch.Tensor) -> str:
    tokens = windows.contiguous().numpy()
    return _hex(str(tokens.shape).encode() + tokens.tobytes())


def _hex(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
