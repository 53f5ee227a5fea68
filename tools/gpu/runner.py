"""Runs one step of the GPU run, so that nothing that it does reaches the other steps.

A step is a process group of its own with a limit. Its output is read while it runs and kept within
bounds. At the limit, when it ends, and when the run itself is stopped, its processes are killed,
also those that left its group: they are found by a variable in their environment. Its other files
go to a folder that is deleted afterwards.
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
MARKER = "RESQ_GPU_CHECK_STEP"  # variable of every process of a step: this process, the step
CUDA_TOOLS = "/usr/local/cuda/bin"  # where nvcc, ncu and compute-sanitizer are, if not on PATH
# They change what pytest prints, which gpu_check reads.
DROPPED = ("PYTEST_ADDOPTS", "PY_COLORS", "FORCE_COLOR")
HEAD, TAIL = 64 << 10, 192 << 10  # bytes of a step's output that are kept: its first and its last
LARGEST_FILE = 4 << 20  # bytes of a result that is kept
GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL
READER_SECONDS = 5.0
KILLED_SECONDS = 10.0  # in which a killed process should have ended; one in the driver may not

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


def marked() -> dict[int, str]:
    """Process -> marker of every process of a step, whatever its group or parent."""
    found = {}
    name = f"{MARKER}=".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            for variable in path.read_bytes().split(b"\0"):
                if variable.startswith(name):
                    found[int(path.parent.name)] = variable[len(name) :].decode(errors="replace")
    return found


def kill(marker: str) -> None:
    """Ends a step's processes: SIGTERM, so that a benchmark may write what it has, then SIGKILL."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 0.0)):
        for process, of in marked().items():
            if of == marker:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
        end = time.monotonic() + wait
        while time.monotonic() < end and marker in marked().values():
            time.sleep(0.05)


def kill_left_over() -> None:
    """Ends the steps of runs that were killed themselves."""
    for marker in set(marked().values()):
        if not Path(f"/proc/{marker.partition('-')[0]}").exists():
            kill(marker)


def variables(environment: dict[str, str], marker: str, folder: str) -> dict[str, str]:
    """The environment of a step."""
    inherited = {name: value for name, value in os.environ.items() if name not in DROPPED}
    for name, first in (("PYTHONPATH", str(ROOT)), ("PATH", "")):
        parts = [first, inherited.get(name, ""), CUDA_TOOLS if name == "PATH" else ""]
        inherited[name] = os.pathsep.join(filter(None, parts))
    own = {"PYTHONUNBUFFERED": "1", MARKER: marker, "TMPDIR": folder}
    return inherited | own | environment


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
    start, marker = time.monotonic(), f"{os.getpid()}-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="resq-gpu-", ignore_cleanup_errors=True) as folder:
        arguments = [part.replace("{out}", f"{folder}/result") for part in command]
        read, write = os.pipe()
        log = BoundedLog(read)
        try:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=variables(environment, marker, folder),
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return {"status": "failed", "exit_code": None, "seconds": 0.0, "log": str(error)} | {
                "files": {}
            }
        finally:
            os.close(write)
        ended = True
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where a signal ends this run
            kill(marker)
        try:
            process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            ended = False
        text = log.text()
        files, too_large = collected(Path(folder))
    if code is None:
        text += f"\nstopped after {limit_s:g} s\n"
    elif code < 0:
        name = signal.strsignal(-code) if -code < signal.NSIG else None
        text += f"\nended by signal {-code} ({name})\n"
    if not ended:
        text += f"\nstill there {KILLED_SECONDS:g} s after SIGKILL\n"
    text += "".join(f"\n{name}: too large to keep\n" for name in too_large)
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


def collected(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """What a step left as result.*, and the names of those that are too large to travel."""
    files, too_large = {}, []
    for path in sorted(folder.glob("result.*")):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                files[path.name] = path.read_bytes()
            elif path.is_file():
                too_large.append(path.name)
    return files, too_large


def figures(files: dict[str, bytes]) -> tuple[Any, list[str]]:
    """(result.json as Python values, faults in it): NaN and infinity become None and are named."""
    if "result.json" not in files:
        return None, []
    try:
        faults: list[str] = []
        return _finite(json.loads(files["result.json"]), "", faults), faults
    except (ValueError, RecursionError) as error:
        return None, [f"result.json: {error}"]


def _finite(value: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part, f"{where}.{key}", faults) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part, f"{where}[{i}]", faults) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{where.lstrip('.')}: expected a number, got {value}")
        return None
    return value
