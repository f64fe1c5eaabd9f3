"""Hooks of MkDocs: pages from the files at the repository's root, and a reference page for each package."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
#: Files at the root that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in the folder of the documentation."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relink(text, "")))
    for page in _pages(config.nav):
        if page.startswith("api/"):
            package = page.removeprefix("api/").removesuffix(".md")
            files.append(File.generated(config, page, content=f"::: {package}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links of the documentation's own pages to pages of the site."""
    if page.file.generated_by:
        return markdown
    return relink(markdown, "docs")


def relink(text: str, folder: str) -> str:
    """Return Markdown whose links fit the site.

    Parameters
    ----------
    text : str
        Markdown whose relative links fit the repository.
    folder : str
        Folder of the file in the repository, "" for the root.

    Returns
    -------
    str
        The text; what is no page of the site, such as a source file, is named without a link.
    """

    def replace(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"{image}[{label}]({PAGES[path]}{anchor or ''})"
        if path.startswith("docs/"):
            return f"{image}[{label}]({path.removeprefix('docs/')}{anchor or ''})"
        return label

    return LINK.sub(replace, text)


def _pages(nav: Any) -> Iterator[str]:
    """Yield the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list):
        for entry in nav:
            yield from _pages(entry)
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from _pages(entry)
