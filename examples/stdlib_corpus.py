"""English and code text that comes with every Python, as a small language-model corpus.

Three kinds of documents are read from the running interpreter, without a download:

* ``topic``: the language reference topics behind ``help()`` (``pydoc_data.topics``);
* ``docs``: for each standard library module, its docstrings under their signatures, found by
  parsing the file with ``ast`` (nothing is imported, so nothing is executed);
* ``source``: the standard library's ``.py`` files themselves.

A document belongs to the held-out part when ``sha256(name) mod 20 == 0``, where ``name`` is the
module's path below the standard library (or ``topic:<name>``). The docstrings and the source of
one module share the name, so both fall on the same side, and a module keeps its side from one
Python version to the next.

Run as a script to write the text to a file::

    python examples/stdlib_corpus.py --part training --out training.txt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import os
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HELDOUT_MODULUS = 20
"""One name in this many is held out."""

SEPARATOR = "\n\n\n"
"""Text between two documents of a joined text."""

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "encodings",  # generated code-page tables
        "idlelib",
        "lib2to3",
        "pydoc_data",  # read as topics instead
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "turtledemo",
    }
)
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py", "_pydecimal.py"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
_MIN_CHARS = 200
_MAX_CHARS = 200_000
_MAX_NON_ASCII = 0.01
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Args:
        name: stable name that decides the split, such as ``json/decoder.py`` or ``topic:if``.
        kind: ``topic``, ``docs`` or ``source``.
        text: the cleaned text, without leading or trailing blank lines.
    """

    name: str
    kind: str
    text: str

    @property
    def heldout(self) -> bool:
        """Whether the document is kept out of training."""
        return is_heldout(self.name)


def is_heldout(name: str) -> bool:
    """Decide the side of the split of a document name.

    Formula: ``int(sha256(name)) mod HELDOUT_MODULUS == 0``.

    Args:
        name: the document's stable name.

    Returns:
        True when documents of that name must never be trained on.
    """
    return int(_digest(name), 16) % HELDOUT_MODULUS == 0


def _digest(name: str) -> str:
    """Return the sha256 of a name as hex digits."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()


def clean_text(text: str) -> str:
    """Normalise line ends, tabs, trailing blanks and control characters.

    Args:
        text: raw text.

    Returns:
        The text with ``\\n`` line ends, tabs expanded to 8 columns, no control characters other
        than the line end, no trailing blanks and at most two empty lines in a row.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text).expandtabs()
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n").rstrip()


def _mostly_ascii(text: str) -> bool:
    """Say whether at most ``_MAX_NON_ASCII`` of the characters lie outside ASCII."""
    other = len(text) - len(text.encode("ascii", "ignore"))
    return other <= _MAX_NON_ASCII * len(text)


def _topic_documents() -> list[Document]:
    """Read the ``help()`` topics, each paragraph kept once.

    Several topics repeat others word for word (``specialnames`` holds all of ``customization``),
    which would put held-out text into training. The longest topic keeps a repeated paragraph; a
    topic left with less than half of its text is dropped.

    Returns:
        The topic documents in the order of their names.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    kept: list[Document] = []
    for name, raw in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        text = clean_text(raw)
        fresh = [part for part in text.split("\n\n") if part.strip() not in seen]
        seen.update(part.strip() for part in fresh)
        rest = clean_text("\n\n".join(fresh))
        if len(rest) >= max(_MIN_CHARS, len(text) // 2):
            kept.append(Document(f"topic:{name}", "topic", rest))
    return sorted(kept, key=lambda document: document.name)


def _stdlib_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of the library's files that belong to the corpus, sorted."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        # Installed packages lie below the library and are many more files.
        folders[:] = [name for name in folders if _belongs(name)]
        paths = (Path(folder, name) for name in files if name.endswith(".py") and _belongs(name))
        found += (path.relative_to(root) for path in paths)
    for path in sorted(found):
        if (name := path.as_posix()) not in _SKIPPED_FILES:
            yield name, root / path


def _belongs(name: str) -> bool:
    """Whether a folder or file of this name is the library's own and of interest."""
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)


def _walk_docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    """Yield ``signature`` plus indented docstring for each documented definition under a node."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            header = f"class {prefix}{child.name}" + (f"({bases})" if bases else "")
        else:
            word = "async def" if isinstance(child, ast.AsyncFunctionDef) else "def"
            header = f"{word} {prefix}{child.name}({ast.unparse(child.args)})"
        doc = ast.get_docstring(child)
        if doc:
            body = "\n".join(f"    {line}" if line else "" for line in doc.split("\n"))
            yield f"{header}\n{body}"
        if isinstance(child, ast.ClassDef):
            yield from _walk_docstrings(child, f"{prefix}{child.name}.")


def module_docs(name: str, source: str) -> str:
    """Write a module's docstrings as one page of documentation.

    Args:
        name: the module's path below the library, such as ``json/decoder.py``.
        source: the module's source text.

    Returns:
        The module's dotted name, its docstring, then each class and function that has a
        docstring under its signature; empty when the file does not parse.
    """
    with warnings.catch_warnings():
        # Old files hold invalid escape sequences; they are the corpus, not our code.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    dotted = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    parts = [f"module {dotted}", ast.get_docstring(tree) or "", *_walk_docstrings(tree, "")]
    return clean_text("\n\n".join(part for part in parts if part))


def _module_documents() -> list[Document]:
    """Read the ``docs`` and ``source`` documents of the standard library, sorted by name."""
    documents: list[Document] = []
    for name, path in _stdlib_files(Path(sysconfig.get_path("stdlib"))):
        try:
            source = clean_text(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
        if not _MIN_CHARS <= len(source) <= _MAX_CHARS or not _mostly_ascii(source):
            continue
        docs = module_docs(name, source)
        if len(docs) >= _MIN_CHARS:
            documents.append(Document(name, "docs", docs))
        documents.append(Document(name, "source", source))
    return documents


@cache
def all_documents() -> tuple[Document, ...]:
    """Read the whole corpus of the running Python, interleaved by kind.

    Within a kind the documents are ordered by the hash of their name; document ``i`` of the
    ``n_k`` of a kind gets the place ``(i + 1/2) / n_k``, and all are sorted by place. Every
    stretch of the result therefore mixes topics, docstrings and code in the overall proportions.

    Returns:
        All documents, training and held-out, in a fixed order for a given Python version.
    """
    documents = _topic_documents() + _module_documents()
    placed: list[tuple[float, str, str, Document]] = []
    for kind in ("topic", "docs", "source"):
        # The split looks at the hash modulo 20 and the order at its leading digits, so the two
        # parts are both spread evenly.
        chosen = sorted((d for d in documents if d.kind == kind), key=lambda d: _digest(d.name))
        for index, document in enumerate(chosen):
            placed.append(((index + 0.5) / len(chosen), kind, document.name, document))
    return tuple(entry[-1] for entry in sorted(placed, key=lambda entry: entry[:3]))


def training_documents(prose_repeats: int = 1) -> list[Document]:
    """Return the documents that may be trained on.

    Args:
        prose_repeats: how often topics and docstring pages occur; more than once weights prose
            against code.

    Returns:
        The training documents, the repeats of a document apart from each other.
    """
    rounds = [[d for d in all_documents() if not d.heldout]]
    prose = [d for d in rounds[0] if d.kind != "source"]
    return [d for part in rounds + [prose] * (prose_repeats - 1) for d in part]


def heldout_documents() -> list[Document]:
    """Return the documents that are never trained on."""
    return [d for d in all_documents() if d.heldout]


def _join(documents: Sequence[Document], max_chars: int | None, piece_chars: int) -> str:
    """Join documents to one text, cut into pieces taken in turn when there is a limit.

    Args:
        documents: documents in order.
        max_chars: length limit, or None for everything.
        piece_chars: with a limit, how much is taken of each document per round, so that a short
            text still comes from many documents.

    Returns:
        A text of at most ``max_chars`` characters.
    """
    if max_chars is None:
        return SEPARATOR.join(d.text for d in documents)
    pieces: list[str] = []
    total = 0
    longest = max((len(d.text) for d in documents), default=0)
    for start in range(0, longest, piece_chars):
        for document in documents:
            piece = document.text[start : start + piece_chars]
            if not piece:
                continue
            pieces.append(piece)
            total += len(piece) + len(SEPARATOR)
            if total >= max_chars:
                return SEPARATOR.join(pieces)[:max_chars]
    return SEPARATOR.join(pieces)[:max_chars]


def training_text(max_chars: int | None = None) -> str:
    """Return the training part as one text.

    Args:
        max_chars: length limit, or None for everything.

    Returns:
        The joined training documents.
    """
    return _join(training_documents(), max_chars, piece_chars=8192)


def calibration_text(max_chars: int) -> str:
    """Return a slice of the training part for calibrating a quantizer.

    Args:
        max_chars: length limit.

    Returns:
        A text of at most ``max_chars`` characters with the openings of many documents.
    """
    return _join(training_documents(), max_chars, piece_chars=4096)


def heldout_text(max_chars: int | None = None) -> str:
    """Return the held-out part as one text.

    Args:
        max_chars: length limit, or None for everything.

    Returns:
        The joined held-out documents, or pieces of many of them under a limit.
    """
    return _join(heldout_documents(), max_chars, piece_chars=4096)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place.

    Args:
        path: destination; its folder is made when missing.
        text: content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Write a part of the corpus to a file, or print its size.

    Args:
        argv: command-line arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = ("training", "heldout", "calibration")
    parser.add_argument("--part", choices=parts, default="training")
    parser.add_argument("--max-chars", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="without it only sizes are printed")
    args = parser.parse_args(argv)
    if args.out is None:
        for kind in ("topic", "docs", "source"):
            for heldout in (False, True):
                chosen = [d for d in all_documents() if d.kind == kind and d.heldout == heldout]
                part = "heldout" if heldout else "training"
                chars = sum(len(d.text) for d in chosen)
                print(f"{part:9s}{kind:7s}{len(chosen):5d} documents{chars:10d} characters")
        return
    if args.part == "training":
        text = training_text(args.max_chars)
    elif args.part == "heldout":
        text = heldout_text(args.max_chars)
    else:
        text = calibration_text(args.max_chars or 200_000)
    write_atomically(args.out, text)
    print(f"{args.out}: {len(text)} characters")


if __name__ == "__main__":
    main()
