"""Reproducible runs: the order in which contributions are summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from google.protobuf.struct_pb2 import Struct

T = TypeVar("T")


def in_order(arrivals: Iterable[tuple[str, T | None]], names: Iterable[str]) -> Iterator[T]:
    """Yield items in the order of their senders' names, each as soon as all earlier senders are done.

    A sum of floats depends on its order, and the order of arrival is random. Items that arrive early are buffered, in
    the worst case (the first name arrives last) all but one of them.

    Parameters
    ----------
    arrivals : iterable of (str, item or None)
        Senders and their items as they arrive; None for a sender without an item.
    names : iterable of str
        The expected senders. Items of other senders come last.
    """
    waiting = sorted(names, reverse=True)
    held: dict[str, T | None] = {}
    for name, item in arrivals:
        held[name] = item
        del item
        while waiting and waiting[-1] in held:
            if (ready := held.pop(waiting.pop())) is not None:
                yield ready
            del ready
    for name in [*sorted(waiting), *sorted(held.keys() - set(waiting))]:
        if (ready := held.pop(name, None)) is not None:
            yield ready
        del ready


def is_reproducible(settings: Struct) -> bool:
    """Whether a plan asks for a reproducible run; the settings are validated elsewhere."""
    said: Mapping[str, object] = dict(settings.items())
    return said.get("reproducible", False) is True
