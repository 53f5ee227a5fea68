"""The report of a GPU run: report.json, report.md and logs.tar.gz, rewritten after every step."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 11_000  # of the Markdown, which is printed at the end: 12,000 come back
MOST_FAILURES = 7_000  # of these for the steps and the ends of those that failed
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
            self._attachments[f"{name}/log.txt"] = log.encode(errors="replace")
        self._attachments |= {f"{name}/{file}": data for file, data in files.items()}
        self.write()

    def write(self) -> None:
        """Writes all three files, each to a temporary name first."""
        contents = {
            "report.json": lambda: json.dumps(self.figures(), indent=1, allow_nan=False).encode(),
            "report.md": lambda: self.markdown().encode(errors="replace"),
            "logs.tar.gz": self._archive,
        }
        for name, content in contents.items():
            self._write(name, content)

    def _write(self, name: str, content: Callable[[], bytes]) -> None:
        partial = self._folder / f"{name}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content())
            partial.replace(self._folder / name)
        except Exception as error:  # whatever a step has written must not end the others
            say(f"gpu_check: {name}: not written: {type(error).__name__}: {error}")
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def figures(self) -> dict[str, Any]:
        """report.json."""
        return {**self._facts, "steps": self.steps}

    def _archive(self) -> bytes:
        """All logs and results; from the largest on, those are left out that would make the
        archive too large to travel."""
        kept = dict(self._attachments)
        while len(packed := packed_files(kept)) > LARGEST_ARCHIVE:
            excess = len(packed) - LARGEST_ARCHIVE
            while kept and excess > 0:  # at least as much as is too much, however it packs
                largest = max(kept, key=lambda name: len(kept[name]))
                excess -= len(kept.pop(largest))
        return packed

    def markdown(self) -> str:
        """report.md: every step, then the figures, then the ends of what failed, as far as they
        fit."""
        machine = self._facts.get("machine", {})
        title = f"# GPU run, {self._facts.get('date')}, {machine.get('gpu', 'no GPU')}, commit "
        parts = [f"{title}{self._facts.get('commit')}\n\n```\n{self.table()}\n```"]
        failures = [
            _failure(step) for step in self.steps if step["status"] not in ("passed", "skipped")
        ]
        parts += failures
        parts += [text for step in self.steps if (text := _section(step))]
        text, left_out = "", 0
        for part in parts:
            most = MOST_FAILURES if part in failures else MOST_CHARACTERS
            if len(text) + len(part) > most:
                left_out += 1
            else:
                text += part + "\n\n"
        return text + (f"({left_out} sections more in report.json)\n" if left_out else "")

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


def say(text: str) -> None:
    """Prints a line; where nobody reads it any more, nothing."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


def packed_files(files: dict[str, bytes]) -> bytes:
    """An archive of files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _failure(step: dict[str, Any]) -> str:
    return f"## {step['name']}: {step['status']}\n\n```\n{step['end']}\n```"


def _section(step: dict[str, Any]) -> str:
    """The figures of a step, as far as they are those of a benchmark."""
    try:
        return _rows(step)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"## {step['name']}: its rows cannot be read: {type(error).__name__}: {error}"


def _rows(step: dict[str, Any]) -> str:
    """A benchmark's measured calls: time, share of the bound, ratio to the best alternative."""
    figures = step.get("figures") or {}
    rows = figures.get("rows") if isinstance(figures, dict) else None
    if isinstance(figures, dict) and figures.get("choices"):
        return _choices(step["name"], figures["choices"])
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


def _choices(name: str, records: list[dict[str, Any]]) -> str:
    """A sweep: for each product the dispatch's choice and the fastest, and what failed."""
    places: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        where = tuple(str(record[key]) for key in ("model", "layer", "m"))
        places.setdefault(where, []).append(record)
    lines = []
    for where, found in places.items():
        timed = [record for record in found if record["us"]]
        best = min(timed, key=lambda record: record["us"], default=None)
        chosen = next((record for record in timed if record["chosen"]), None)
        cells = [f"{' '.join(where):28}"]
        cells += [f"{r['us']:8.1f} {r['choice']:26}" if r else "-" for r in (chosen, best)]
        failed = len(found) - len(timed)
        lines.append(" ".join(cells).rstrip() + (f" {failed} failed" if failed else ""))
    left_out = len(lines) - 3 * MOST_ROWS
    more = [f"({left_out} lines more in report.json)"] if left_out > 0 else []
    title = f"## {name} ({len(records)} choices; us of the dispatch's and of the fastest)"
    return "\n".join([title, "", "```", *lines[: 3 * MOST_ROWS], *more, "```"])


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
