"""Levels: the size of the sub-model that each client trains (HeteroFL, FjORD, DepthFL, InclusiveFL, Split-Mix).

A level is a share of the whole model in (0, 1], of its width or of its depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from espalier.config.fields import SettingsGroup, setting_error
from espalier.errors import ConfigError
from espalier.seeds import rng_for

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings
    from espalier.methods.planning import Member

#: Bytes of memory needed to train a level.
Need = Callable[[float], int]


class LevelSettings(SettingsGroup):
    """The sizes of sub-models and which client trains which."""

    levels: str = Field(
        default="1,0.5,0.25", description="sizes of sub-models as shares of the whole, separated by commas"
    )
    level_choice: Literal["spread", "device", "memory", "speed"] = Field(
        default="spread",
        description="how a client gets its level: by name, as set at the device, by memory, by measured speed",
    )
    dynamic_levels: bool = Field(default=False, description="draw the levels again in every round")

    @field_validator("levels")
    @classmethod
    def _check_levels(cls, value: str) -> str:
        try:
            parse_levels(value)
        except ConfigError as error:
            raise setting_error(str(error).removeprefix("levels: ")) from None
        return value

    @property
    def shares(self) -> tuple[float, ...]:
        """The levels as numbers, largest first."""
        return parse_levels(self.levels)


class DistillationSettings(SettingsGroup):
    """Distillation between sub-models."""

    distillation: bool = Field(default=True, description="train small sub-models to match larger ones")


def parse_levels(text: str) -> tuple[float, ...]:
    """Parse `levels`: shares of the whole, largest first, separated by commas.

    Parameters
    ----------
    text : str
        For example ``"1,0.5,0.25"``.

    Returns
    -------
    tuple of float
        The levels, strictly descending, each in (0, 1].

    Raises
    ------
    ConfigError
        If a part is not a number in (0, 1], or they do not descend; the message starts with the setting's key.
    """
    levels = []
    for part in text.split(","):
        try:
            level = float(part)
        except ValueError:
            level = 0.0
        if not 0 < level <= 1:  # NaN fails here, too
            raise ConfigError(
                f'levels: "{part.strip()}" in "{text}" is not a share in (0, 1]; give numbers such as "1,0.5,0.25"'
            )
        levels.append(level)
    if any(a <= b for a, b in itertools.pairwise(levels)):
        ordered = ",".join(f"{level:g}" for level in sorted(set(levels), reverse=True))
        raise ConfigError(f'levels: "{text}" does not descend; write "{ordered}"')
    return tuple(levels)


def assign_levels(
    members: Sequence[Member], settings: RunSettings, round_: int, need: Need | None = None
) -> dict[str, float]:
    """Assign a level to every client.

    By `level-choice`:

    - "spread": equal groups in the order of the names, the largest level first: client i of N gets level number
      ⌊i / (N / L)⌋, as in DepthFL, FjORD and Split-Mix (whose groups start with the smallest).
    - "device": the largest level not above the one configured at the device; without one, as "memory".
    - "memory": with `need`, the largest level that fits into the client's memory, or the smallest if none does (an
      estimate should not exclude a client); without `need`, by rank as "speed".
    - "speed": by rank; the fastest N/L clients get the largest level, and so on. Clients of equal speed get the
      level of the first of them; a client without a measurement gets the smallest.

    With `dynamic-levels` (HeteroFL's "dynamic" setting) a client's level is sampled uniformly in every round: from all
    levels with "spread", otherwise from those up to its assigned level, which fits the device.

    Parameters
    ----------
    members : sequence of Member
        Clients that can participate, in any order.
    settings : RunSettings
        `levels`, `level-choice`, `dynamic-levels`, `seed`.
    round_ : int
        The round; used with `dynamic-levels` only.
    need : callable, optional
        Bytes needed to train a level.

    Returns
    -------
    dict of str to float
        Level of each client, in the order of the names.

    Raises
    ------
    ConfigError
        If a device's configured level is below the smallest one.
    """
    chosen = settings.of(LevelSettings)
    levels = chosen.shares
    ordered = sorted(members, key=lambda m: m.name)
    if chosen.level_choice == "spread":
        given = {m.name: levels[i * len(levels) // len(ordered)] for i, m in enumerate(ordered)}
    elif chosen.level_choice == "speed":
        given = _by_rank({m.name: m.speed for m in ordered}, levels)
    else:
        given = _by_memory(ordered, levels, need)
        if chosen.level_choice == "device":
            given |= {m.name: _own_level(m, levels) for m in ordered if m.level > 0}
    if not chosen.dynamic_levels:
        return given
    drawn = {}
    for name, most in given.items():
        choices = [v for v in levels if v <= most or chosen.level_choice == "spread"]
        drawn[name] = choices[int(rng_for(settings.seed, name, round_, "level").integers(len(choices)))]
    return drawn


def _own_level(member: Member, levels: Sequence[float]) -> float:
    fitting = [v for v in levels if v <= member.level]
    if not fitting:
        raise ConfigError(
            f"client {member.name} is set to level {member.level:g}, below the smallest of "
            f"levels={','.join(f'{v:g}' for v in levels)}; add a smaller one there or raise the client's"
        )
    return fitting[0]


def _by_memory(ordered: Sequence[Member], levels: Sequence[float], need: Need | None) -> dict[str, float]:
    if need is None:
        return _by_rank({m.name: m.memory for m in ordered}, levels)
    needs = [need(v) for v in levels]
    return {
        m.name: next((v for v, n in zip(levels, needs, strict=True) if n <= m.memory), levels[-1])
        for m in ordered
    }


def _by_rank(strengths: dict[str, float], levels: Sequence[float]) -> dict[str, float]:
    """Return a level by the number of stronger clients; strength 0 means unknown."""
    count = len(strengths)
    found = {}
    for name, strength in strengths.items():
        stronger = sum(other > strength for other in strengths.values())
        found[name] = levels[stronger * len(levels) // count] if strength > 0 else levels[-1]
    return found
