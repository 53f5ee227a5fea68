"""Makes the site of the repository's own texts, when mkdocs builds it (mkdocs.yml).

README.md and its like become pages, and the names of pages (docs/cli.md, docs/notes/0024) become
links: the texts name each other as paths, which is what reads well in a terminal.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
NAME = re.compile(r"(?<![\w`/(\[])docs/([\w/-]+\.md|notes/\d{4})(?![\w`-]|/\w)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the texts that lie outside of docs/."""
    for uri, name in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links the names of pages; code blocks (indented or fenced) stay as they are."""
    folder = posixpath.dirname(page.file.src_uri)
    pages = [file.src_uri for file in files.documentation_pages()]

    def link(match: re.Match[str]) -> str:
        targets = [uri for uri in pages if uri.startswith(match[1])]
        if not targets:
            raise PluginError(f"{page.file.src_uri}: expected the page {match[0]}, found none")
        return f"[{match[0]}]({posixpath.relpath(targets[0], folder)})"

    lines = markdown.split("\n")
    fenced = False
    for number, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith("    "):
            lines[number] = NAME.sub(link, line)
    return "\n".join(lines)
