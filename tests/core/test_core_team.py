"""Team: every item of every job once, whichever threads come, and no race that a tool can see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_done_once(core: ModuleType, threads: int) -> None:
    for seed in range(3):
        assert core.team_mistakes(threads, threads, 20_000, seed) == 0


@pytest.mark.parametrize(("threads", "present"), [(2, 1), (4, 2), (7, 6)])
def test_the_first_thread_waits_for_none_that_does_not_come(
    core: ModuleType, threads: int, present: int
) -> None:
    assert core.team_mistakes(threads, present, 20_000, 11) == 0


def test_no_data_race(tmp_path: Path) -> None:
    program = tmp_path / "team_race"
    flags = [
        "-O1",
        "-g",
        "-std=c++20",
        "-fsanitize=thread",
        f"-I{HERE.parent.parent / 'csrc'}",
        f"-I{HERE}",
        "-pthread",
    ]
    source = HERE / "team_race.cc"
    built = subprocess.run(
        [os.environ.get("CXX", "g++"), *flags, "-x", "c++", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address space layout")
    assert run.returncode == 0, run.stderr[-4000:]
