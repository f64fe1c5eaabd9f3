"""What the documentation names exists: links, paths, modules, commands with their options, make targets."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.support.command_line import find_command, options
from tests.support.paths import ROOT

PAGES = sorted(
    [*ROOT.glob("docs/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
)
PAGES = [page for page in PAGES if page.exists()]
#: Folders of the repository whose contents a page may name by path.
FOLDERS = "common|server|edge|client|proto|docker|docs|tests|bench|examples|.github"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Return everything that a page sets as code: spans and the lines of fenced blocks."""
    text = text_of(page)
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose) + [line for block in blocks for line in block.splitlines()]


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in slugs(linked), target


@each_page
def test_paths_exist(page: Path) -> None:
    named = {
        path.rstrip("/.,:")
        for code in code_of(page)
        for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*)", code)
    }
    assert {path for path in named if "NAME" not in path and not (ROOT / path).exists()} == set()


@each_page
def test_modules_and_their_attributes_exist(page: Path) -> None:
    for name in set(
        re.findall(
            r"(?<![\w/.-])((?:espalier(?:_[a-z]+)?|bench|tests)(?:\.[a-z]\w*)+)", "\n".join(code_of(page))
        )
    ):
        parts = name.split(".")
        found: object = importlib.import_module(parts[0])
        for end, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:end]))
            found = getattr(found, part)


def command_lines(page: Path) -> list[list[str]]:
    """Return the `espalier` commands of a page's fenced blocks, continued lines joined, as words."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    lines = re.sub(r" *\\\n *", " ", "\n".join(blocks)).splitlines()
    found = [re.fullmatch(r"(?:\w+\$ +)?espalier (\S.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@each_page
def test_commands_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for words in command_lines(page):
        names = [words[0].split("|")[0], *(word.split("|")[0] for word in words[1:])]
        command, _ = find_command(names)
        given = {word.strip("[]").split("=")[0] for word in words if re.match(r"\[?--?[a-z]", word)}
        assert given <= options(*command.split()), " ".join(words)


@each_page
def test_make_targets_exist(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = {
        match[1] for code in code_of(page) if (match := re.match(r"(?:\w+\$ +)?make ([a-z][\w-]*)", code))
    }
    assert named <= targets


def test_the_log_lines_of_the_certificates_page_are_those_of_the_node() -> None:
    section = text_of(ROOT / "docs" / "certificates.md").split("| its log says |")[1]
    said = [line.split("|")[1].strip() for line in section.splitlines()[2:] if line.startswith("|")]
    assert len(said) > 5
    sources = "\n".join(text_of(path) for path in (ROOT / "common" / "espalier" / "flower").glob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that stand on several lines
    assert [line for line in said if line not in joined] == []
