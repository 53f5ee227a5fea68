"""Reading texts: the papers' WikiText-2 string from the raw file, and what is refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from resq_kernels import texts


def test_wikitext_rows_are_joined_as_in_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The data set's rows are the file's lines, with "" for blank ones; the form feed and the
    # line separator belong to a sentence and must not end a row.
    (tmp_path / "wiki.test.raw").write_text(" \n = T = \n \n a\x0cb\u2028c \n", encoding="utf-8")
    monkeypatch.setenv("RESQ_WIKITEXT2", str(tmp_path))
    expected = "\n\n".join(["", " = T = \n", "", " a\x0cb\u2028c \n"])
    assert texts.load_text("wikitext2", "test") == expected
    monkeypatch.setenv("RESQ_WIKITEXT2", str(tmp_path / "wiki.test.raw"))
    assert texts.wikitext2("test") == expected


def test_wikitext_never_takes_another_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wiki.test.raw").write_text("words\n")
    monkeypatch.setenv("RESQ_WIKITEXT2", str(tmp_path / "wiki.test.raw"))
    with pytest.raises(ValueError, match=r"expected a folder with wiki\.train\.raw"):
        texts.wikitext2("train")
    monkeypatch.setenv("RESQ_WIKITEXT2", str(tmp_path))
    with pytest.raises(ValueError, match=r"wiki\.train\.raw does not exist"):
        texts.wikitext2("train")
    with pytest.raises(ValueError, match="split: expected one of train, valid, test, got 'dev'"):
        texts.wikitext2("dev")


def test_wikitext_through_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        asked.append((*names, split))
        if split == "test":
            raise ConnectionError("no route")
        return {"text": ["", " = T = \n", " words \n"]}

    datasets = types.ModuleType("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.delenv("RESQ_WIKITEXT2", raising=False)
    assert texts.wikitext2("valid") == "\n\n = T = \n\n\n words \n"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    with pytest.raises(ValueError, match=r"download failed \(no route\); put wiki\.test\.raw"):
        texts.wikitext2("test")


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert texts.read_text(path) == "hello"


def test_read_text_refuses_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        texts.read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        texts.read_text(tmp_path)
