"""The elements that the report page is built from: tiles, cards and tables."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page, with a name and a note."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A chart with a title and a note. A card with an empty body is not shown."""

    title: str
    body: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    columns : list of str
        Column names.
    rows : list of list of str
        One list of cells per row.
    numeric : frozenset of int
        Indices of the columns that are aligned to the right.
    more : int
        Number of rows that are not shown.
    """

    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    more: int = 0
