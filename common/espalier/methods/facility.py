"""DivFL's selection: clients whose gradients stand for everyone's, by facility location (ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.diverse import distances, greedy, lazy_greedy, sketch, stochastic_greedy
from espalier.methods.planning import Member, pick_clients, pick_count
from espalier.methods.selection import Answer, Selection
from espalier.seeds import rng_for, seed_for

if TYPE_CHECKING:
    from espalier.config.run_config import RunConfig

#: Longest gradient that the table keeps as it is; a longer one is sketched to this length: a table of 1000
#: clients takes at most 64 MB, and squared distances have a relative standard deviation of at most 1.1 %.
LONGEST = 1 << 14


class DivFL(Selection):
    """m clients that minimise G(S) = Σ_k min_{i∈S} ‖∇F_k − ∇F_i‖ (Balakrishnan et al., ICLR 2022, eq. 4).

    With `divfl-gradients = "ideal"` everyone answers with a fresh gradient whenever a window is planned.
    With "no-overhead" everyone is asked once, when first seen; afterwards only the rows of those that
    trained are renewed, by what they report (`observe`). The server's mean is weighted by samples, as in
    the authors' code. Within a window the set chosen at its start is kept.

    Gradients of another size than the newest (the model was pruned) are forgotten, and their clients
    asked again at the next opportunity.
    """

    probe = "gradient"

    def __init__(self, settings: RunConfig) -> None:
        super().__init__(settings)
        # Everyone's gradient is asked for anyway in the ideal variant.
        self.reports = "gradient" if settings.divfl_gradients == "no-overhead" else ""
        self._rows: dict[str, np.ndarray] = {}
        self._size = 0
        self._members: list[Member] = []
        self._chosen: list[str] = []

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return whose gradient is needed: everyone ("ideal"), or whose is not known (often nobody)."""
        self._members = sorted(members, key=lambda m: m.name)
        ideal = self.settings.divfl_gradients == "ideal"
        return [m for m in self._members if ideal or m.name not in self._rows]

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the picks among the members whose gradient is known; fewer than m if fewer are."""
        asked = {m.name for m in candidates}
        for name in asked:
            # A stale row must not stand for a client that was asked and is silent.
            self._rows.pop(name, None)
        for name in sorted(asked & answers.keys()):
            self._store(name, answers[name].arrays)
        known = [m for m in self._members if m.name in self._rows]
        count = min(pick_count(self.settings.fraction, len(self._members)), len(known))
        picked = self._maximise(known, count, round_) if count else []
        self._chosen = [m.name for m in picked]
        return picked

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return the set of the window's start; if none of it is left, as many clients at random."""
        kept = [m for m in sorted(members, key=lambda m: m.name) if m.name in self._chosen]
        s = self.settings
        return kept or pick_clients(members, s.fraction, s.seed, round_), 0

    def observe(
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Renew the participants' rows."""
        for name in sorted(gradients):
            self._store(name, gradients[name])

    def state(self) -> dict[str, np.ndarray]:
        """Return "gradient/NAME" for each row of the table, and "size", the gradients' full length."""
        rows = {f"gradient/{name}": row for name, row in sorted(self._rows.items())}
        return {"size": np.array([self._size]), **rows} if rows else {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back the table."""
        self._size = int(state["size"][0]) if "size" in state else 0
        self._rows = {
            key.removeprefix("gradient/"): np.asarray(row, dtype=np.float32)
            for key, row in state.items()
            if key.startswith("gradient/")
        }

    def _store(self, name: str, gradient: Mapping[str, np.ndarray]) -> None:
        """Keep a gradient, flattened in the order of its tensors' names; one that is not finite is not kept."""
        if not gradient:
            return
        row = np.concatenate([np.ravel(gradient[n]).astype(np.float32) for n in sorted(gradient)])
        if not np.isfinite(row).all():
            return
        if row.size != self._size:
            self._rows, self._size = {}, row.size
        # One seed for all rows and rounds: distances mean something only within one sketch.
        self._rows[name] = sketch(row, LONGEST, seed_for(self.settings.seed, "cloud", 0, "sketch"))

    def _maximise(self, known: Sequence[Member], count: int, round_: int) -> list[Member]:
        table = distances(np.stack([self._rows[m.name] for m in known]))
        how = self.settings.divfl_greedy
        if how == "stochastic":
            pool = max(count, round(0.1 * len(known)))
            rng = rng_for(self.settings.seed, "cloud", round_, "selection")
            chosen = stochastic_greedy(table, count, pool, rng)
        else:
            chosen = (lazy_greedy if how == "lazy" else greedy)(table, count)
        return [known[i] for i in sorted(chosen)]
