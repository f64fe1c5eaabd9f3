"""Sources cite what a reader of the repository can open: no page, and no section of a page, that is not in it."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

FOLDERS = ("common", "server", "edge", "client", "proto", "docker", "bench", "tests", "docs", ".github")
ENDINGS = (".py", ".proto", ".toml", ".yml", ".md", ".sh", "Dockerfile")
SOURCES = sorted(
    path
    for path in [
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*")),
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
    ]
    if path.is_file()
    and path.name.endswith((*ENDINGS, "Makefile"))
    and path.name != "mkdocs.yml"  # MkDocs checks its own
)
PAGES = {path.name for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")]}
#: Pages of the site that are made from files at the root.
GENERATED = {"index.md", "contributing.md", "changelog.md", "security-policy.md"}


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_pages_that_are_named_exist(folder: str) -> None:
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != folder and not (folder == "." and path.parent == ROOT):
            continue
        text = path.read_text(encoding="utf-8")
        named = {name.split("/")[-1] for name in re.findall(r"(?<![\w./*-])[\w./-]*[\w-]\.md\b", text)}
        assert named <= PAGES | GENERATED, f"{path.relative_to(ROOT)}: {sorted(named - PAGES - GENERATED)}"


def test_sections_are_those_of_papers_or_pages() -> None:
    """A section is cited with a paper's identifier or a page."""
    cited = re.compile(r"\b[A-Z]{4,} ?§")
    for path in SOURCES:
        assert not cited.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)
