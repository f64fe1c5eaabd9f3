"""Claims of the methods' papers, and the rules that compare them with the results of our runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.cells import Cell, Measured, Setup, average, spread
from bench.report import Row, Target

Values = Mapping[str, bool | int | float | str]
Results = Mapping[str, Sequence[Measured]]
"""Variant -> the results of its seeds."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes
    ----------
    settings : Mapping
        Settings in addition to the claim's.
    present : int
        Number of clients that take part, from the first one; 0: all.
    """

    settings: Values
    present: int = 0


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, the regime that it holds in, and the comparison that tests it.

    Attributes
    ----------
    name : str
        Name in the table.
    scheme : str
        The partition of the data.
    settings : Mapping
        Settings that all variants share.
    variants : Mapping of str to Variant
        Variants to compare, by name.
    judge : callable
        Returns targets from the variants' results.
    target : float
        Accuracy for "rounds to target"; 0: none.
    data : str
        Data set, if other than the command's.
    images : int
        Images of a client, if other than the command's; 0: the command's.
    minority : int
        See `Cell`.
    shown : str
        Attribute of `Point` that the plot shows.
    note : str
        An explanation printed below the table.
    """

    name: str
    scheme: str
    settings: Values
    variants: Mapping[str, Variant]
    judge: Callable[[Claim, Results], list[Target]]
    target: float = 0.0
    data: str = ""
    images: int = 0
    minority: int = 0
    shown: str = "main"
    note: str = ""

    def cells(self, setup: Setup) -> dict[str, list[Cell]]:
        """Return the cells of each variant, one per seed."""
        own = replace(setup, data=self.data or setup.data, images=self.images or setup.images)
        return {
            label: [
                Cell(own, self.scheme, {**self.settings, **v.settings}, seed, v.present, self.minority)
                for seed in range(1, setup.seeds + 1)
            ]
            for label, v in self.variants.items()
        }

    def rows(self, results: Results) -> list[Row]:
        """Return a row for each variant."""
        return [row(self.name, label, found, self.target) for label, found in results.items()]


def row(part: str, label: str, found: Sequence[Measured], target: float) -> Row:
    """Return the table row of one variant over its seeds; accuracies in per cent."""
    last = [m.last for m in found]
    reached = [m.rounds_to(target) for m in found] if target else []
    entry: Row = {
        "part": part,
        "method": label,
        "seeds": len([m for m in found if m.points]),
        "accuracy": percent(average(p.accuracy for p in last)),
        "accuracy_sd": percent(spread(p.accuracy for p in last)),
        "clients": percent(average(p.mean for p in last)),
        "clients_sd": percent(spread(p.mean for p in last)),
        "worst10": percent(average(p.worst for p in last)),
        "worst10_sd": percent(spread(p.worst for p in last)),
        "target": percent(target) if target else None,
        "rounds_to_target": average(reached),
        "reached": f"{sum(r is not None for r in reached)}/{len(reached)}" if target else None,
    }
    for link in ("client-edge", "edge-cloud"):
        for way in ("up", "down"):
            sent = average(m.links.get(f"{link} {way}") for m in found)
            entry[f"{link.replace('-', '_')}_{way}_kb"] = None if sent is None else round(sent / 1e3, 1)
    entry["seconds"] = round(average(m.seconds for m in found) or 0.0, 1)
    faults = {m.status for m in found} - {"finished"}
    entry["status"] = "; ".join(sorted(faults)) or "finished"
    return entry


def percent(value: float | None) -> float | None:
    """Return a share in per cent with one decimal."""
    return None if value is None else round(100 * value, 1)


def accuracies(found: Sequence[Measured], of: str, *, best: bool = False) -> float:
    """Return the mean over seeds of an attribute of `Point`, in per cent; NaN if no run has it.

    A run's value is the mean of its last three measurements, or with `best` its best measurement.
    """
    value = average(getattr(m.best if best else m.last, of) for m in found)
    return float("nan") if value is None else 100 * value


def mean_rounds(found: Sequence[Measured], target: float) -> float:
    """Return the mean rounds to a target accuracy; a run that does not reach it counts its last round plus one."""
    counts = []
    for m in found:
        reached = m.rounds_to(target)
        counts.append(reached if reached is not None else (m.points[-1].round + 1 if m.points else 0))
    return sum(counts) / len(counts)


def fewer_rounds(base: str, *others: str) -> Callable[[Claim, Results], list[Target]]:
    """Return a rule: each of the others reaches the claim's target in fewer rounds than the base."""

    def judge(claim: Claim, results: Results) -> list[Target]:
        limit = mean_rounds(results[base], claim.target)
        found = []
        for other in others:
            value = mean_rounds(results[other], claim.target)
            reached = any(m.rounds_to(claim.target) is not None for m in results[other])
            name = f"{claim.name}: {other}, rounds to {100 * claim.target:g} % (below {base})"
            found.append(Target(name, value, limit, reached and value < limit))
        return found

    return judge


def above(of: str, points: float, *pairs: tuple[str, str]) -> Callable[[Claim, Results], list[Target]]:
    """Return a rule: the first of each pair is at least `points` above the second; with 0, above by any margin."""

    def judge(claim: Claim, results: Results) -> list[Target]:
        names = {"accuracy": "accuracy", "mean": "clients' mean accuracy", "worst": "worst tenth"}
        found = []
        for better, base in pairs:
            value = accuracies(results[better], of) - accuracies(results[base], of)
            name = f"{claim.name}: {better} over {base}, points of {names[of]}"
            found.append(Target(name, value, points, value >= points if points else value > 0))
        return found

    return judge


def cheap_and_as_good(claim: Claim, results: Results) -> list[Target]:
    """Test FedPAQ's claim: less than one point lost at about an eighth of the bytes."""
    lost = accuracies(results["fedavg"], "accuracy") - accuracies(results["fedpaq"], "accuracy")
    up = {label: average(m.links.get("client-edge up") for m in found) for label, found in results.items()}
    share = (up["fedpaq"] or 0.0) / (up["fedavg"] or float("nan"))
    return [
        Target(f"{claim.name}: points lost", lost, 1.0, lost < 1.0),
        Target.within(f"{claim.name}: bytes up over fedavg's", share, 0.11, 0.14),
    ]


def levels_against_few(methods: Mapping[str, Values], fitting: int) -> dict[str, Variant]:
    """Return variants of each method: clients of all levels, and only those that fit the full network."""
    found = {}
    for name, settings in methods.items():
        found[name] = Variant({"method": name, **settings})
        found[f"{name}, whole only"] = Variant({"method": name, **settings, "levels": "1"}, fitting)
    return found


def pairs(methods: Mapping[str, Values]) -> list[tuple[str, str]]:
    """Return the pairs of variants that :func:`levels_against_few` compares."""
    return [(name, f"{name}, whole only") for name in methods]
