"""Formats sizes, durations, lists of names and curves as short text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def names(found: Sequence[str], most: int = 6) -> str:
    """Return names separated by commas; of more than `most` names, the first ones and the number of all."""
    if len(found) <= most:
        return ", ".join(found) or "-"
    return f"{', '.join(found[:most])} … ({len(found)})"


def spark(values: Sequence[float], width: int = 40) -> str:
    """Return the last `width` values as a row of bars; values that are not finite are left out."""
    values = [value for value in values[-width:] if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(_BARS[round((value - low) / ((high - low) or 1.0) * (len(_BARS) - 1))] for value in values)


def size(count: float) -> str:
    """Return a number of bytes, e.g. ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a time span, e.g. ``2 min 05 s``; "?" for one that is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
