"""What commands print and write: aligned tables, sizes, JSON files that appear whole."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class CommandError(Exception):
    """A failure whose message is the whole sentence for the user."""


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


def check_json_target(path: str | None, option: str = "--json") -> None:
    """Refuses a file that cannot be written, before any work is done; `option` asked for it.

    Raises:
        CommandError: it is a folder, or its folder does not exist or is read-only.
    """
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise CommandError(f"{option}: expected a file, {path} is a folder")
    if not folder.is_dir():
        raise CommandError(f"{option}: the folder {folder} does not exist")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"{option}: cannot write to {folder}: {error.strerror}") from error


def write_json(path: str | None, figures: Mapping[str, object]) -> None:
    """Writes figures under a temporary name, then moves it: FILE is complete or unchanged.

    Numbers that are not finite become null (JSON has none).
    """
    if path is None:
        return
    target = Path(path)
    text = json.dumps(_plain(figures), indent=2, allow_nan=False) + "\n"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise CommandError(f"--json: cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
