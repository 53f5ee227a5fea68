"""What commands print and write: aligned tables, sizes, files that appear whole."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO


class CommandError(Exception):
    """A failure whose message is the whole sentence for the user."""


class UsageError(CommandError):
    """Wrong usage: the value of an option, or options that do not go together."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Rows as lines of aligned cells.

    Args:
        rows: cells as text.
        header: underlined titles; all columns but the first are then aligned right. None aligns
            every column left: a list of names and values.
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    right = header is not None
    text = [
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if header:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def size(count: float) -> str:
    """Bytes in decimal units, three significant digits: 1536000 -> "1.54 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_target(
    path: str | None,
    option: str = "--json",
    *,
    out: Path | None = None,
    reads: Sequence[str | None] = (),
    special: bool = True,
) -> None:
    """Refuses a file that cannot be written at the end, before any work is done.

    Args:
        path: the file, None if there is none to write; links are followed.
        option: what asked for it.
        out: the folder that the command writes; the file may be neither in it nor above it.
        reads: files and model folders that the command reads; the file may be none of theirs.
        special: whether it may be a device or a pipe, which is written to and not replaced.

    Raises:
        UsageError: it is a folder or read-only, or its folder does not exist or is read-only, or
            it is read by the command.
    """
    if path is None:
        return
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from error
    if path == "" or (mode is not None and stat.S_ISDIR(mode)):
        raise UsageError(f"{option}: expected a file, got the folder {path or target}")
    if out is not None:
        folder = Path(os.path.realpath(out))
        written = {
            folder,
            *(folder.with_name(folder.name + end) for end in (".partial", ".source")),
        }
        if target in folder.parents or not {target, *target.parents}.isdisjoint(written):
            raise UsageError(f"{option}: expected a file outside of {out}, got {path}")
    for source in filter(None, reads):
        if target in map(Path, map(os.path.realpath, _files(Path(source)))):
            raise UsageError(f"{option}: expected another file than those of {source}, got {path}")
    if mode is not None and not os.access(path, os.W_OK):
        raise UsageError(f"{option}: cannot write {path}: {os.strerror(errno.EACCES)}")
    if mode is not None and not stat.S_ISREG(mode):
        if not special or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            raise UsageError(f"{option}: expected an ordinary file, got {path}")
        return
    if not target.parent.is_dir():
        raise UsageError(f"{option}: the folder {target.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {target.parent}: {error.strerror}") from error


def _files(source: Path) -> list[Path]:
    """A file, or those of a model folder without the figures that were written beside them."""
    if not source.is_dir():
        return [source]
    from resq_kernels.ptq.save import companions

    names = ("config.json", "README.md", "quantization_report.*", "*.safetensors*", "*.bin*")
    return [*companions(source), *(path for name in names for path in source.glob(name))]


def write_json(path: str | None, figures: Mapping[str, object]) -> None:
    """Writes figures as `write_text` does; JSON has no infinity and no NaN, which become null."""
    if path is not None:
        write_text(path, json.dumps(_plain(figures), indent=2, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes a file under a temporary name, then moves it: FILE is complete or unchanged.

    A device or a pipe is written to.

    Raises:
        CommandError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".resq-{os.getpid()}.partial")
    try:
        if stream := _stream(path):
            stream.write(text)
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "w", encoding="utf-8") as special:
                special.write(text)
        else:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _stream(path: str) -> TextIO | None:
    """stdout or stderr if that is what the path names: replacing or opening a file that the shell
    opened for it would lose what has been printed."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return stream
    return None


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
