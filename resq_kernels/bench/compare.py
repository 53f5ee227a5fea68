"""Two runs of `resq bench` side by side: which rows have become slower (`resq bench --compare`).

Reads `machine`, `rows` and of each row its place, `ours_us` and `ratio` alone: keys that every
file since the first has, so that renaming others leaves old files comparable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Keys of the machine that must agree for times to be comparable, and keys of a row that say what
# was measured.
_MACHINE = ("processor", "cores", "threads", "isa", "device", "clock")
_PLACE = ("op", "model", "layer", "layers", "batch", "shape", "baseline")
HEADER = ["op", "model", "layer", "shape", "baseline", "old us", "new us"]
HEADER += ["us new / old", "ratio new / old", ""]


def read(path: str) -> dict[str, Any]:
    """The figures that a run wrote with `--json` or `--out`.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        usable = isinstance(figures["machine"], dict) and isinstance(figures["rows"], list)
        ended = figures.get("complete", True)
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise ValueError(f"--compare: {path}: expected a file of `resq bench --json`, got another")
    if not ended:
        raise ValueError(f"--compare: {path}: expected a run that ended, got one that was stopped")
    return dict(figures)


def check_machines(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses to compare times of two different machines: they say nothing about the kernels.

    Raises:
        ValueError: another processor, GPU, instruction set, number of threads or clock.
    """
    before, after = _facts(old), _facts(new)
    differing = [key for key in before if before[key] != after[key]]
    if differing:
        raise ValueError(
            "--compare: expected two runs of one machine, got "
            + "; ".join(f"{key} {before[key]} and {after[key]}" for key in differing)
            + " (--other-machine compares them all the same)"
        )


def _facts(machine: Mapping[str, Any]) -> dict[str, Any]:
    gpu = machine.get("gpu") or {}
    return {key: machine.get(key) for key in _MACHINE} | {"gpu": gpu.get("gpu")}


def compare(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], percent: float
) -> list[dict[str, Any]]:
    """The rows that both runs have, in the order of the new one.

    A row counts as slower if our time grew by more than `percent` and its ratio to the baseline,
    which was timed in the same run, fell by as much: a busy machine slows both sides, and another
    torch changes the ratio but not our time.

    Args:
        old, new: rows of `resq bench`.
        percent: growth of the time that counts as slower.

    Returns:
        For each row the keys that say what was measured, `old_us`, `new_us`, `time` (new / old),
        `ratio` (new / old; None without a baseline) and `slower`.

    Raises:
        ValueError: the runs have no row in common.
    """
    before = {_place(row): row for row in old}
    limit = 1 + percent / 100
    found = []
    for row in new:
        was = before.get(_place(row))
        if was is None:
            continue
        time = row["ours_us"] / was["ours_us"]
        ratio = row["ratio"] / was["ratio"] if row["ratio"] and was["ratio"] else None
        found.append(
            {key: row[key] for key in _PLACE if key in row}
            | {"old_us": was["ours_us"], "new_us": row["ours_us"]}
            | {"time": round(time, 3), "ratio": None if ratio is None else round(ratio, 3)}
            | {"slower": time > limit and (ratio is None or ratio < 1 / limit)}
        )
    if not found:
        raise ValueError("--compare: expected rows that both runs have, got none")
    return found


def _place(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in _PLACE)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of `compare` as the cells under HEADER."""
    texts = [str(row.get(key) or "") for key in ("op", "model", "layer", "shape", "baseline")]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    figures = [f"{row['old_us']:.1f}", f"{row['new_us']:.1f}", f"{row['time']:.2f}", ratio]
    return [*texts, *figures, "slower" if row["slower"] else ""]
