"""Runs that give the same bits again: what order sums are taken in, and which settings rule that out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.struct_pb2 import Struct

if TYPE_CHECKING:
    from espalier.config.settings import Settings

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


def contradictions(settings: Settings, edge_choice: str) -> list[str]:
    """Return the settings of a reproducible run by which chance would get in, one line each, key first.

    Parameters
    ----------
    settings : Settings
        The run's settings.
    edge_choice : str
        `edge-choice`, with "auto" resolved by the method.
    """
    if not settings.reproducible:
        return []
    faults = []
    if edge_choice == "shape":
        faults.append(
            "edge-choice: shape goes by measured link times, which reproducible=true rules out; "
            "use homogeneity, random or fixed"
        )
    if settings.level_choice == "speed":
        faults.append(
            "level-choice: speed is measured, which reproducible=true rules out; use spread, device or memory"
        )
    noises = ("histogram_epsilon", "dp_sgd_noise", "dp_sgd_epsilon", "update_noise")
    faults += [
        f"{key.replace('_', '-')}: the noise must be a secret of the devices, which reproducible=true rules out; "
        "set it to 0"
        for key in noises
        if getattr(settings, key) > 0
    ]
    if settings.device not in ("auto", "cpu"):
        faults.append(
            f"device: {settings.device} may round differently every time; set device=cpu or reproducible=false"
        )
    return faults
