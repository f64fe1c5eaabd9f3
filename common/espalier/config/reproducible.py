"""Runs that give the same bits again: what order sums are taken in, and which settings rule that out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from google.protobuf.struct_pb2 import Struct

T = TypeVar("T")


def in_order(arrivals: Iterable[tuple[str, T | None]], names: Iterable[str]) -> Iterator[T]:
    """Yield what arrives in the order of the senders' names, each as soon as all before it are settled.

    Sums of floats depend on their order, and arrival is chance. What comes out of turn is held, so in the
    worst case, the first name answering last, all but one item are in memory at a time.

    Parameters
    ----------
    arrivals : iterable of (str, item or None)
        Senders and what they sent, as it comes; None for a sender from whom nothing more is to be had.
    names : iterable of str
        The senders that are waited for. One of another name comes last.
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
    """Whether a plan's settings ask for the same bits again; what they say is validated elsewhere."""
    said: Mapping[str, object] = dict(settings.items())
    return said.get("reproducible", False) is True
