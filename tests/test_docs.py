"""What README, docs/ and docstrings state about the program holds."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resq_kernels
from resq_kernels import ops
from resq_kernels.cli import build_parser
from resq_kernels.commands import COMMANDS
from resq_kernels.testing.quantized_models import random_quantized
from resq_kernels.testing.tiny_models import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "docs/notes"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
SNIPPETS = [
    (page, number, code)
    for page, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]
# Others are run where what they are about is installed (tests/integrations/test_vllm.py,
# tests/ops/test_hub_kernel.py).
ELSEWHERE = re.compile("from (vllm|openai|kernels) ")
SNIPPETS = [snippet for snippet in SNIPPETS if not ELSEWHERE.search(snippet[2])]
# What a snippet is run with instead, to take seconds.
SMALLER = [
    ("samples=64, seqlen=512", "samples=2, seqlen=32"),
    ("max_new_tokens=40", "max_new_tokens=3"),
]


def test_the_snippets_are_found() -> None:
    pages = {"README.md", "docs/cuda.md", "docs/integrations.md"}
    assert {page for page, _, _ in SNIPPETS} == pages


@pytest.mark.parametrize(
    ("page", "code"), [pytest.param(p, c, id=f"{p}-{n}") for p, n, c in SNIPPETS]
)
def test_snippets_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that holds what they name, with a model where they begin with one."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(ROOT / "examples/tiny-llama")
    (tmp_path / "calibration.txt").write_text(PAGES["README.md"])
    monkeypatch.chdir(tmp_path)
    if page == "README.md":
        for whole, small in SMALLER:
            assert whole in code
            code = code.replace(whole, small)
        exec(code, {})
        assert (tmp_path / "out/model-resq/model.safetensors").exists()
    elif page == "docs/integrations.md":
        random_quantized("llama").save_pretrained(tmp_path / "out/model-resq")
        make_tokenizer().save_pretrained(tmp_path / "out/model-resq")
        exec(code, {})
    else:
        ids = torch.tensor([[5, 6, 7]])
        exec(code, {"model": random_quantized("llama"), "ids": ids, "resq_kernels": resq_kernels})


def command_lines() -> list[str]:
    """Lines that show how `resq` is called: of the pages, and of --help."""
    texts = [*PAGES.values(), *(command.DESCRIPTION for command in COMMANDS.values())]
    return sorted({line for text in texts for line in re.findall(r"^ +resq (.+)$", text, re.M)})


def test_command_lines_are_found() -> None:
    lines = command_lines()
    for name in COMMANDS:
        assert any(line.startswith(name) for line in lines), name


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line, comments=True)
    build_parser().parse_args(words[: words.index("<")] if "<" in words else words)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        name
        for text in PAGES.values()
        for name in re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.M)
    }
    assert {"demo", "test", "lint"} <= named
    assert not named - targets


def test_paths_exist() -> None:
    """Of files and folders; `<op>`, `*` and `NAME` stand for something."""
    pattern = r"(?<![\w./-])((?:docs|csrc|resq_kernels|tests|tools|examples)/[\w./-]*\w)(?![\w*<])"
    missing = [
        (page, name)
        for page, text in PAGES.items()
        for name in re.findall(pattern, text)
        if not list(ROOT.glob(name)) and not list(ROOT.glob(f"{name}-*.md"))
    ]
    assert not missing


def test_every_note_is_listed() -> None:
    listed = re.findall(r"^- \[(\d{4})\]\((.+?)\): \S", (NOTES / "README.md").read_text(), re.M)
    assert [name for _, name in listed] == sorted(path.name for path in NOTES.glob("0*.md"))
    assert all(name.startswith(number) for number, name in listed)


PUBLIC = [getattr(resq_kernels, name) for name in resq_kernels.__all__]
PUBLIC += [getattr(ops, name) for name in ops.__all__]


def test_the_site_shows_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    public = {f"resq_kernels.{name}" for name in resq_kernels.__all__}
    public |= {f"resq_kernels.ops.{name}" for name in ops.__all__}
    assert set(re.findall(r"^::: ([\w.]+)$", pages, re.M)) == public


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_every_argument_is_documented(thing: Callable[..., object]) -> None:
    section = re.search(r"^Args:\n((?: {4}.*\n|\n)+)", f"{inspect.getdoc(thing)}\n", re.M)
    lines = re.findall(r"^ {4}([\w, ]+): ", section[1], re.M) if section else []
    documented = {name.strip() for line in lines for name in line.split(",")}
    missing = set(inspect.signature(thing).parameters) - documented
    assert not missing, f"{thing.__name__}: no word about {sorted(missing)}"
