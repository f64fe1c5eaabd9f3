"""Parsing of settings that list prefixes of tensor names, such as "conv1,conv2"."""

from __future__ import annotations


def prefixes(text: str) -> tuple[str, ...]:
    """Return the prefixes of a comma-separated list, without surrounding blanks or empty entries."""
    return tuple(p for p in (part.strip() for part in text.split(",")) if p)


def matches(name: str, text: str) -> bool:
    """Return whether a tensor's name starts with one of the prefixes of a comma-separated list."""
    return name.startswith(prefixes(text)) if prefixes(text) else False
