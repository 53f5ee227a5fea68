"""Runs clang-tidy on the .cpp files of the CPU library, with the commands of setup.py.

Usage: python tools/clang_tidy.py [FILE...], FILE a part of a path; the checks stand in .clang-tidy.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def commands(folder: Path) -> list[dict[str, str]]:
    """compile_commands.json of the CPU library, written into a folder; nothing is built."""
    with mock.patch("setuptools.setup"):
        project = runpy.run_path(str(ROOT / "setup.py"))
    extensions = [(project["sources"](cuda=False), folder / "library.so")]
    (folder / "build.ninja").write_text(project["ninja_file"](extensions, folder, None))
    listed = subprocess.run(
        [BIN / "ninja", "-C", folder, "-t", "compdb", "compile"],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "compile_commands.json").write_text(listed.stdout)
    return json.loads(listed.stdout)


def main() -> int:
    """0 if nothing was found in the files whose path holds an argument, or in all."""
    with tempfile.TemporaryDirectory() as name:
        files = sorted(command["file"] for command in commands(Path(name)))
        if sys.argv[1:]:
            files = [file for file in files if any(part in file for part in sys.argv[1:])]
        if not files:
            sys.exit(f"clang_tidy: expected files of the CPU library, got {sys.argv[1:]}")

        def check(file: str) -> subprocess.CompletedProcess[str]:
            call = [BIN / "clang-tidy", "--quiet", "-p", name, file]
            return subprocess.run(call, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(check, files))
    failed = [result for result in done if result.returncode]
    for result in failed:
        sys.stdout.write(result.stdout or result.stderr)
    print(f"clang-tidy: {len(files)} files, something found in {len(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
