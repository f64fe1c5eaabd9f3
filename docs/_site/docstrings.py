"""An extension of Griffe: reads `#:` comments as attributes' docstrings, and Sphinx' roles as code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")


class Docstrings(Extension):
    """Makes docstrings fit Markdown, and finds those that are comments."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of an object that was read."""
        if isinstance(obj, Attribute) and obj.docstring is None:
            comment = _comment_above(obj)
            if comment:
                obj.docstring = Docstring(comment, lineno=obj.lineno, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


def _comment_above(attribute: Attribute) -> str:
    """Return the `#:` comment above an attribute, "" if there is none."""
    path = attribute.filepath
    if attribute.lineno is None or not isinstance(path, Path):
        return ""
    lines = attribute.lines_collection[path][: attribute.lineno - 1]
    found: list[str] = []
    while lines and lines[-1].lstrip().startswith("#:"):
        found.insert(0, lines.pop().lstrip().removeprefix("#:").strip())
    return "\n".join(found)
