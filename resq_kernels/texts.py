"""Text for calibration and evaluation: a file, or WikiText-2 as the papers read it."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

WIKITEXT2 = "wikitext2"
WIKITEXT2_VARIABLE = "RESQ_WIKITEXT2"
SPLITS = ("train", "valid", "test")


def load_text(source: str, split: str) -> str:
    """The text that a `--calib`, `--text` or `--dataset` argument names.

    Args:
        source: "wikitext2", or the path of a UTF-8 text file.
        split: "train", "valid" or "test"; which part of WikiText-2 is meant (a file has one part).

    Raises:
        ValueError: the file is missing, empty or not UTF-8, or WikiText-2 is not on this machine.
    """
    return wikitext2(split) if source == WIKITEXT2 else read_text(Path(source))


def check_source(source: str, option: str) -> None:
    """Refuses a source of `load_text` that is certain to fail, before any work is done.

    Raises:
        ValueError: the file is missing or has no name, or WikiText-2 is neither in RESQ_WIKITEXT2
            nor can be downloaded; the message says that `option` takes a file.
    """
    if not source:
        raise ValueError(f"{option}: expected the name of a file, got ''")
    if source != WIKITEXT2:
        if not Path(source).exists():
            raise ValueError(f"text: {source} does not exist")
    elif not os.environ.get(WIKITEXT2_VARIABLE) and importlib.util.find_spec("datasets") is None:
        raise ValueError(
            "wikitext2: the text is not on this machine: "
            f"`pip install 'resq_kernels[datasets]'`, or give a text with `{option} FILE`, "
            f"or set {WIKITEXT2_VARIABLE} to the folder of its files"
        )


def read_text(path: Path) -> str:
    """The contents of a UTF-8 text file.

    Raises:
        ValueError: there is no such file, it cannot be read, it is not UTF-8 (the message gives
            the first wrong byte) or it holds nothing but white space.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"text: {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"text: {path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path}: expected UTF-8, got byte 0x{data[error.start]:02x} "
            f"at position {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    return text


def wikitext2(split: str) -> str:
    """WikiText-2 (raw) as GPTQ, QuaRot and ResQ join it: "\\n\\n" between the data set's rows.

    A row is a line of the original file, blank lines become "". The variable RESQ_WIKITEXT2 names
    the folder of the files wiki.{train,valid,test}.raw, or one of them; without it the `datasets`
    package is asked for `Salesforce/wikitext`, `wikitext-2-raw-v1`.

    Raises:
        ValueError: the split is unknown, or the text is neither there nor can be downloaded; the
            message says how to get it.
    """
    if split not in SPLITS:
        raise ValueError(f"wikitext2: split: expected one of {', '.join(SPLITS)}, got {split!r}")
    place = os.environ.get(WIKITEXT2_VARIABLE)
    if place:
        # Lines end at "\n" only: str.splitlines would also cut at form feeds inside a sentence.
        return join_rows(list(io.StringIO(read_text(_raw_file(Path(place), split)))))
    advice = (
        f"put wiki.{split}.raw of wikitext-2-raw-v1 into a folder and set {WIKITEXT2_VARIABLE} "
        "to it, or `pip install 'resq_kernels[datasets]'` on a machine with a connection, "
        "or name a text file"
    )
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"wikitext2: the text is not on this machine; {advice}") from None
    name = {"valid": "validation"}.get(split, split)
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=name)["text"]
    except Exception as error:  # the hub client raises a dozen unrelated types when offline
        raise ValueError(f"wikitext2: the download failed ({error}); {advice}") from error
    return join_rows(rows)


def join_rows(rows: list[str]) -> str:
    """The text of the papers' protocol: "\\n\\n".join of the rows, blank rows as ""."""
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _raw_file(place: Path, split: str) -> Path:
    """wiki.{split}.raw in or at `place`; a file of another split is refused, not used instead."""
    if not place.is_file():
        return place / f"wiki.{split}.raw"
    if f".{split}." not in place.name:
        raise ValueError(
            f"{WIKITEXT2_VARIABLE}: expected a folder with wiki.{split}.raw or that file, "
            f"got {place}"
        )
    return place


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The ids of the whole text without BOS or any other special token, int64 [tokens]."""
    import torch

    # verbose=False: the ids are cut into windows later, so the "longer than the maximum" warning
    # would be wrong.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
