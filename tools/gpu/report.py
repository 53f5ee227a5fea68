"""The report of a GPU run: report.json, report.md and logs.tar.gz, rewritten after every step."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 11_000  # of the Markdown, which is printed at the end: 12,000 come back
MOST_ROWS = 16  # of a benchmark in the Markdown; report.json has them all
LARGEST_ARCHIVE = 12 << 20  # bytes
ENTRY = "{name:28} {status:8} {seconds:6.1f} of {limit_s:3g} s"


class Report:
    """What a run has found so far, in a folder.

    Args:
        folder: receives the three files.
        facts: keys of report.json beside `steps`: machine, commit, ...
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder, self._facts = folder, facts
        self.steps: list[dict[str, Any]] = []
        self._attachments: dict[str, bytes] = {}

    def set_fact(self, key: str, value: Any) -> None:
        """Adds or replaces a key of report.json."""
        self._facts[key] = value

    def add(self, step: dict[str, Any], log: str, files: dict[str, bytes]) -> None:
        """Records a step and writes the files anew. A disk that is full costs this version only."""
        self.steps.append(step)
        name = step["name"]
        if log:
            self._attachments[f"{name}/log.txt"] = log.encode()
        self._attachments |= {f"{name}/{file}": data for file, data in files.items()}
        self.write()

    def write(self) -> None:
        """Writes all three files, each to a temporary name first."""
        contents = {
            "report.json": lambda: json.dumps(self.figures(), indent=1, allow_nan=False).encode(),
            "report.md": lambda: self.markdown().encode(),
            "logs.tar.gz": self._archive,
        }
        for name, content in contents.items():
            self._write(name, content)

    def _write(self, name: str, content: Callable[[], bytes]) -> None:
        partial = self._folder / f"{name}.partial"
        try:
            partial.write_bytes(content())
            partial.replace(self._folder / name)
        except OSError as error:
            sys.stderr.write(f"gpu_check: {name}: not written: {error}\n")
            partial.unlink(missing_ok=True)

    def figures(self) -> dict[str, Any]:
        """report.json."""
        return {**self._facts, "steps": self.steps}

    def _archive(self) -> bytes:
        """All logs and results; from the largest on, those are left out that would make the
        archive too large to travel."""
        kept = dict(self._attachments)
        while True:
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                for name, data in kept.items():
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mtime = len(data), int(time.time())
                    archive.addfile(entry, io.BytesIO(data))
            if len(packed.getvalue()) <= LARGEST_ARCHIVE or not kept:
                return packed.getvalue()
            del kept[max(kept, key=lambda name: len(kept[name]))]

    def markdown(self) -> str:
        """report.md: every step, then the figures, then the ends of what failed, as far as they
        fit."""
        machine = self._facts.get("machine", {})
        title = f"# GPU run, {self._facts.get('date')}, {machine.get('gpu', 'no GPU')}, commit "
        parts = [f"{title}{self._facts.get('commit')}\n\n```\n{self.table()}\n```"]
        failures = [step for step in self.steps if step["status"] not in ("passed", "skipped")]
        parts += [_failure(step) for step in failures]
        parts += [text for step in self.steps if (text := _rows(step))]
        text = ""
        for index, part in enumerate(parts):
            if len(text) + len(part) > MOST_CHARACTERS:
                return f"{text}\n({len(parts) - index} sections more in report.json)\n"
            text += part + "\n\n"
        return text

    def table(self) -> str:
        """A line for each step; those skipped for one reason are one line."""
        lines, skipped = [], {}
        for step in self.steps:
            if step["status"] == "skipped":
                skipped.setdefault(step["summary"], []).append(step["name"])
            else:
                lines.append(f"{ENTRY.format(**step)}  {step['summary']}".rstrip()[:110])
        lines += [f"skipped, {reason}: {' '.join(names)}" for reason, names in skipped.items()]
        return "\n".join(lines)


def _failure(step: dict[str, Any]) -> str:
    return f"## {step['name']}: {step['status']}\n\n```\n{step['end']}\n```"


def _rows(step: dict[str, Any]) -> str:
    """A benchmark's measured calls: time, share of the bound, ratio to the best alternative."""
    figures = step.get("figures") or {}
    rows = figures.get("rows") if isinstance(figures, dict) else None
    if not rows:
        return ""
    places: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        where = tuple(str(row.get(key)) for key in ("op", "model", "layer", "batch"))
        places.setdefault(where, []).append(row)
    lines = [_line(where, found) for where, found in places.items()]
    left_out = len(lines) - MOST_ROWS
    more = [f"({left_out} lines more in report.json)"] if left_out > 0 else []
    title = f"## {step['name']} (us, share of the bound, ratio to the fastest alternative)"
    return "\n".join([title, "", "```", *lines[:MOST_ROWS], *more, "```"])


def _line(where: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    timed = [row for row in rows if row.get("baseline_us")]
    line = f"{' '.join(where):52} {_number(first.get('ours_us')):>9}"
    line += f" {_number(first.get('ceiling_share'), 2):>5}"
    if timed:
        best = min(timed, key=lambda row: row["baseline_us"])
        line += f" {_number(best.get('ratio'), 2):>6} {best['baseline']}"
    return line


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def last_lines(log: str, count: int = 14, width: int = 160) -> str:
    """The end of a log for the Markdown, without colours."""
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines()]
    return "\n".join(line[:width] for line in [line for line in lines if line][-count:])
