"""Runs one step of the GPU run, so that nothing that it does reaches the other steps.

A step is a process group of its own with a limit. Its output is read while it runs and kept within
bounds; at the limit, and when it ends, every process that it started is killed, also those that
left its group. Its other files go to a folder that is deleted afterwards.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKER = "RESQ_GPU_CHECK_STEP"  # in the environment of every process of a step
HEAD, TAIL = 64 << 10, 192 << 10  # bytes of a step's output that are kept: its first and its last
LARGEST_FILE = 4 << 20  # bytes of a result that is kept
GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL
READER_SECONDS = 5.0

Result = dict[str, Any]


class BoundedLog:
    """The first and the last bytes of an output, read by a thread until its end.

    Args:
        pipe: the read end.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._head, self._tail, self._left_out = b"", b"", 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._pipe, 1 << 16)
            except OSError:
                return
            if not data:
                return
            if room := HEAD - len(self._head):
                self._head, data = self._head + data[:room], data[room:]
            joined = self._tail + data
            self._left_out += max(len(joined) - TAIL, 0)
            self._tail = joined[-TAIL:]

    def text(self) -> str:
        """All that is kept, once the output has ended."""
        self._thread.join(READER_SECONDS)
        left_out = f"\n... {self._left_out} bytes left out ...\n" if self._left_out else ""
        parts = (self._head.decode(errors="replace"), left_out, self._tail.decode(errors="replace"))
        return "".join(parts)


def processes(marker: str) -> list[int]:
    """Processes whose environment holds the marker of a step, whatever their group or parent."""
    found = []
    wanted = f"{MARKER}={marker}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill(group: int, marker: str) -> None:
    """Ends a step's processes: SIGTERM, so that a benchmark may write what it has, then SIGKILL."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        for process in processes(marker):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, number)
        end = time.monotonic() + wait
        while time.monotonic() < end and processes(marker):
            time.sleep(0.05)


def run(command: Sequence[str], environment: dict[str, str], limit_s: float) -> Result:
    """Runs a command within its limit; never raises for what the command does.

    Args:
        command: program and arguments; "{out}" in one is the prefix of files that it may write.
        environment: variables beside those of this process.
        limit_s: seconds after which it is killed.

    Returns:
        status ("passed", "failed", "timeout" or "crashed"), exit_code (None after a timeout),
        seconds, log, and files: name -> bytes of what it wrote under "{out}".
    """
    start, marker = time.monotonic(), uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="resq-gpu-", ignore_cleanup_errors=True) as folder:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        variables |= environment | {MARKER: marker, "TMPDIR": folder}
        arguments = [part.replace("{out}", f"{folder}/result") for part in command]
        read, write = os.pipe()
        log = BoundedLog(read)
        try:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            os.close(write)
            return {"status": "failed", "exit_code": None, "seconds": 0.0, "log": str(error)} | {
                "files": {}
            }
        os.close(write)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        kill(process.pid, marker)
        process.wait()
        text = log.text()
        files = collected(Path(folder))
    if code is None:
        text += f"\nstopped after {limit_s:g} s\n"
    elif code < 0:
        text += f"\nended by signal {-code} ({signal.Signals(-code).name})\n"
    # Under a wrapper (a profiler, a shell) a signal arrives as 128 + its number.
    crashed = code is not None and (code < 0 or code > 128)
    status = "timeout" if code is None else "crashed" if crashed else "failed"
    return {
        "status": "passed" if code == 0 else status,
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "log": text,
        "files": files,
    }


def collected(folder: Path) -> dict[str, bytes]:
    """What a step left as result.*, as far as it is not too large to travel."""
    files = {}
    for path in sorted(folder.glob("result.*")):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                files[path.name] = path.read_bytes()
    return files


def figures(files: dict[str, bytes]) -> tuple[Any, list[str]]:
    """(result.json as Python values, faults in it): NaN and infinity become None and are named."""
    if "result.json" not in files:
        return None, []
    try:
        value = json.loads(files["result.json"])
    except ValueError as error:
        return None, [f"result.json: {error}"]
    faults: list[str] = []
    return _finite(value, "", faults), faults


def _finite(value: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part, f"{where}.{key}", faults) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part, f"{where}[{i}]", faults) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{where.lstrip('.')}: expected a number, got {value}")
        return None
    return value
