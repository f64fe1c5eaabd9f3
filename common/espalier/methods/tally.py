"""What servers add up: weighted means, sums and forwarded tensors that merge from edges to the cloud."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from espalier.methods.accumulate import add_scaled
from espalier.wire.payload import STORED_AS, Layout, Weights

#: Sections of an edge's report. A forwarded tensor is named "@CLIENT/NAME".
WEIGHT, SUM, ROWS, STACK = "weight/", "sum/", "rows/", "@"
#: Scalars of an edge's report.
NOMINAL, COUNT = "weight", "count/"

Arrays = Mapping[str, np.ndarray]

#: Largest weight of one update, and of an edge's sum: times the largest number that is let in
#: (`espalier.wire.payload.LARGEST`) a float32 still holds it.
MAX_WEIGHT, MAX_TOTAL = 1e15, 1e18


class Tally:
    """Sums over updates that merge: edge tallies absorbed at the cloud are the tally over all clients.

    A mean is kept per coordinate: a client may hold only a leading slice ``w[:d0, :d1]`` of a tensor, or
    only some tensors, and what nobody held has no mean. Integer tensors (counters) take the element-wise
    maximum, which merges in any order and never makes a fraction of a counter.

    Parameters
    ----------
    layout : Layout
        The server's tensors.

    Attributes
    ----------
    weight : float
        Total weight of the updates behind the means.
    counts : dict[str, float]
        Scalars that add up.
    stacks : dict[str, dict[str, np.ndarray]]
        Tensors passed on as they came, by client.
    """

    def __init__(self, layout: Layout) -> None:
        self.weight = 0.0
        self.counts: dict[str, float] = {}
        self.stacks: dict[str, dict[str, np.ndarray]] = {}
        self._server = {t.name: t for t in layout.tensors}
        self._weighted: dict[str, np.ndarray] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}

    # --- adding ------------------------------------------------------------------------------------

    def mean(
        self,
        arrays: Arrays,
        weight: float,
        rows: Mapping[str, np.ndarray] | None = None,
        *,
        beside: bool = False,
    ) -> None:
        """Add tensors to the weighted means.

        Parameters
        ----------
        arrays : mapping of str to array
            Whole tensors of the server, or leading slices of them.
        weight : float
            Their weight, not negative; nothing is added at 0.
        rows : mapping of str to array, optional
            For a tensor of which only some leading rows count: bool [rows of the slice].
        beside : bool
            Whether this belongs to an update that was added already, so that `weight` is not counted again.

        Raises
        ------
        ValueError
            If a tensor is none of the server's, larger than the server's or of another kind of number, or
            the weight is negative, absurdly large or not finite. Then nothing was added.
        """
        if not 0 <= weight <= MAX_WEIGHT:  # NaN fails here, too
            raise ValueError(f"the aggregation weight {weight}")
        self._check(arrays)
        if weight == 0:
            return
        held = {
            n: _holders(n, a.shape, self._server[n].shape, weight, (rows or {}).get(n))
            for n, a in arrays.items()
        }
        self.weight += 0.0 if beside else weight
        for name, array in arrays.items():
            self._add_mean(name, array, held[name])

    def sum(self, arrays: Arrays, factor: float = 1.0) -> None:
        """Add factor times tensors (whole or leading slices) to the sums."""
        self._check(arrays)
        for name, array in arrays.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(self._server[name].shape, _sum_dtype(array.dtype))
            part = self._sums[name][_region(array.shape)]
            if part.dtype.kind == "f":
                add_scaled(part, factor, array)
            else:
                part += part.dtype.type(factor) * array

    def count(self, name: str, value: float) -> None:
        """Add to a scalar."""
        self.counts[name] = self.counts.get(name, 0.0) + value

    def rows(self, arrays: Arrays) -> None:
        """Stack rows of a client under those of others, without its name; all arrays have as many."""
        if len({a.shape[:1] for a in arrays.values()}) > 1 or (self._rows and set(arrays) != set(self._rows)):
            raise ValueError(f"rows {sorted(arrays)} that do not go together")
        for name, array in arrays.items():
            former = self._rows.get(name)
            alike = not former or (former[0].dtype == array.dtype and former[0].shape[1:] == array.shape[1:])
            if not array.ndim or not alike:
                raise ValueError(f"rows {name!r} of {array.dtype}{list(array.shape[1:])}, unlike the others")
        for name, array in arrays.items():
            self._rows.setdefault(name, []).append(array)

    def forward(self, client: str, arrays: Arrays) -> None:
        """Pass a client's tensors on to the cloud as they are."""
        self.stacks.setdefault(client, {}).update(arrays)

    # --- reading -----------------------------------------------------------------------------------

    def means(self, former: Arrays) -> dict[str, np.ndarray]:
        """Return the mean of every tensor that somebody held; its other coordinates are the former ones."""
        return {name: self._mean(name, former) for name in self._weighted}

    def _mean(self, name: str, former: Arrays) -> np.ndarray:
        total, weight = self._weighted[name], self._weights[name]
        held = weight > 0
        mean = total
        if total.dtype.kind == "f":
            mean = total / np.where(held, weight, 1).astype(total.dtype)
        if not held.all():
            mean = np.where(held, mean, former[name])
        return mean.astype(STORED_AS[self._server[name].dtype], copy=False)

    def held(self, name: str) -> np.ndarray:
        """Return which coordinates of a tensor somebody held; bool, broadcasts to the tensor's shape."""
        return np.asarray(self._weights[name] > 0) if name in self._weights else np.array(False)

    def weights(self, name: str) -> np.ndarray:
        """Return the weight of each coordinate of a mean; it broadcasts to the tensor's shape."""
        return self._weights.get(name, np.zeros(()))

    def stacked_rows(self) -> dict[str, np.ndarray]:
        """Return the stacked rows by name, ordered by their values alone, so that the order names nobody."""
        joined = {name: np.concatenate(parts) for name, parts in sorted(self._rows.items())}
        columns = [c for a in joined.values() for c in a.reshape(len(a), -1).T]
        order = np.lexsort(columns[::-1]) if columns else np.zeros(0, np.int64)
        return {name: a[order] for name, a in joined.items()}

    def sums(self) -> dict[str, np.ndarray]:
        """Return the sums by tensor name."""
        return dict(self._sums)

    # --- merging -----------------------------------------------------------------------------------

    def report(self, former: Arrays | None = None) -> tuple[Weights, dict[str, float]]:
        """Return what an edge tells the cloud: tensors, and scalars beside them.

        Coordinates of a mean that nobody held are those of `former`, or else what changes neither sum nor maximum.
        """
        means = Layout(tuple(self._server[n] for n in self._weighted))
        arrays = {
            WEIGHT + name: np.array(weight)
            for name, weight in self._weights.items()
            if not (weight.size == 1 and float(weight.flat[0]) == self.weight)
        }
        arrays |= {SUM + name: total for name, total in self._sums.items()}
        arrays |= {
            f"{STACK}{client}/{name}": array
            for client, stack in self.stacks.items()
            for name, array in stack.items()
        }
        arrays |= {ROWS + name: array for name, array in self.stacked_rows().items()}
        scalars = {NOMINAL: self.weight} | {COUNT + name: value for name, value in self.counts.items()}
        others = Layout.of(arrays)
        whole = Weights.empty(Layout((*means.tensors, *others.tensors)))
        views = whole.views()
        # One mean at a time: all of them beside the tally and the report would be a third model.
        for name, total in self._weighted.items():
            views[name][...] = self._mean(name, former or {name: _lowest(total.dtype)})
        for name, array in arrays.items():
            views[name][...] = array
        return whole, scalars

    def absorb(self, report: Weights, scalars: Mapping[str, float], scale: float = 1.0) -> None:
        """Merge an edge's report.

        Parameters
        ----------
        report : Weights
            Its tensors.
        scalars : mapping of str to float
            Its scalars.
        scale : float
            Factor on the weights of its means; sums and counts are not scaled.

        Raises
        ------
        ValueError
            If something in it is none of the server's, of another shape or dtype, or a bad weight.
        """
        parts: dict[str, dict[str, np.ndarray]] = {"": {}, WEIGHT: {}, SUM: {}, ROWS: {}, STACK: {}}
        for name, array in report.views().items():
            section = next((s for s in (WEIGHT, SUM, ROWS, STACK) if name.startswith(s)), "")
            parts[section][name.removeprefix(section)] = array
        nominal = scalars.get(NOMINAL, 0.0)
        if not (0 <= nominal <= MAX_TOTAL and 0 <= nominal * scale <= MAX_TOTAL):
            raise ValueError(f"the aggregation weight {nominal}")
        self._check(parts[""], whole=True)
        self._check(parts[SUM], whole=True)
        if bad := [n for n, v in scalars.items() if n.startswith(COUNT) and not math.isfinite(v)]:
            raise ValueError(f"the count {bad[0].removeprefix(COUNT)!r} is not finite")
        weights = {
            n: _checked_weight(n, a, parts[WEIGHT].get(n, np.asarray(nominal)), scale)
            for n, a in parts[""].items()
        }
        if parts[ROWS]:  # what they refuse must come before anything was added
            self.rows(parts[ROWS])
        for name, array in parts[""].items():
            self._add_mean(name, array, weights[name] * scale)
        self.weight += nominal * scale
        self.sum(parts[SUM])
        for name, value in scalars.items():
            if name.startswith(COUNT):
                self.count(name.removeprefix(COUNT), value)
        for name, array in parts[STACK].items():
            client, _, tensor = name.partition("/")
            self.forward(client, {tensor: array})

    def extend(self, later: Tally) -> None:
        """Go on with a later round of the same window.

        Sums, counts and weights add up; a mean becomes the later round's where that has one, because it
        was trained from this one's.
        """
        for name, total in later._weighted.items():
            if name not in self._weighted:
                self._weighted[name], self._weights[name] = total, later._weights[name]
                continue
            mine, theirs = self._weights[name], later._weights[name]
            if total.dtype.kind == "f":
                scale = np.where(theirs > 0, (mine + theirs) / np.where(theirs > 0, theirs, 1), 0)
                kept = np.broadcast_to(theirs > 0, total.shape)
                self._weighted[name] = np.where(kept, total * scale.astype(total.dtype), self._weighted[name])
            else:
                self._weighted[name] = np.maximum(self._weighted[name], total)
            self._weights[name] = mine + theirs
        self.weight += later.weight
        self.sum(later._sums)
        for count, value in later.counts.items():
            self.count(count, value)
        if later._rows:
            self._rows = dict(later._rows)
        for client, stack in later.stacks.items():
            self.stacks[client] = dict(stack)

    # --- inside ------------------------------------------------------------------------------------

    def _check(self, arrays: Arrays, whole: bool = False) -> None:
        for name, array in arrays.items():
            spec = self._server.get(name)
            if spec is None:
                raise ValueError(f"tensor {name!r} is none of the server's")
            if spec.dtype == "bfloat16":
                raise ValueError(f"tensor {name!r} is bfloat16, which cannot be averaged")
            if array.dtype.kind != STORED_AS[spec.dtype].kind:
                raise ValueError(f"tensor {name!r} is {array.dtype}, the server's is {spec.dtype}")
            fits = len(array.shape) == len(spec.shape) and all(
                a <= b for a, b in zip(array.shape, spec.shape, strict=True)
            )
            if not fits or (whole and array.shape != spec.shape) or array.shape[2:] != spec.shape[2:]:
                raise ValueError(
                    f"tensor {name!r} has shape {list(array.shape)}, the server's is {list(spec.shape)}"
                )

    def _add_mean(self, name: str, array: np.ndarray, weight: np.ndarray) -> None:
        """Add weight·array, the weight being 0 outside the leading slice that the array is."""
        spec = self._server[name]
        region = _region(array.shape)
        if name not in self._weighted:
            dtype = _sum_dtype(array.dtype)
            self._weighted[name] = np.full(spec.shape, _lowest(dtype))
            self._weights[name] = np.zeros((), np.float64)
        total = self._weighted[name]
        if total.dtype.kind == "f":
            if weight.ndim:
                factor = weight[tuple(slice(0, n) for n in array.shape[: weight.ndim])]
                total[region] += factor.astype(total.dtype) * array
            else:
                add_scaled(total[region], float(weight), array)
        else:
            np.maximum(total[region], array, out=total[region])
        self._weights[name] = self._weights[name] + weight


def _region(shape: Iterable[int]) -> tuple[Any, ...]:
    # The ellipsis makes a part of a tensor without dimensions (a counter) an array, too.
    return (*(slice(0, n) for n in shape), ...)


def _sum_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Half precision is summed in single."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _lowest(dtype: np.dtype[np.generic]) -> np.ndarray:
    """Return what changes neither a sum nor, of integers, a maximum."""
    return np.array(0 if dtype.kind in "fub" else np.iinfo(str(dtype)).min, dtype)


def _holders(
    name: str, held: tuple[int, ...], whole: tuple[int, ...], weight: float, rows: np.ndarray | None
) -> np.ndarray:
    """Return the weight of each coordinate: a scalar where all is held, else one a row and column."""
    if held == whole and rows is None:
        return np.asarray(weight)
    if rows is not None and rows.shape != held[:1]:
        raise ValueError(f"tensor {name!r} has shape {list(held)}, {rows.size} of its rows are spoken of")
    # One number a row or column only where they differ: an edge's report carries these.
    differ = [held[i] != whole[i] or (i == 0 and rows is not None) for i in range(min(2, len(whole)))]
    shape = [whole[i] if d else 1 for i, d in enumerate(differ)] + [1] * (len(whole) - 2)
    found = np.zeros(shape)
    part = found[_region(held[:2])]
    part[...] = weight if rows is None else (weight * rows).reshape(-1, *(1,) * (found.ndim - 1))
    return found


def _checked_weight(name: str, array: np.ndarray, weight: np.ndarray, scale: float) -> np.ndarray:
    fits = weight.ndim in (0, array.ndim) and all(
        w == 1 or (w == a and i < 2) for i, (w, a) in enumerate(zip(weight.shape, array.shape, strict=False))
    )
    if not fits:
        raise ValueError(f"the weights of tensor {name!r} have shape {list(weight.shape)}")
    if (
        weight.dtype.kind != "f"
        or not ((weight >= 0) & (weight <= MAX_TOTAL) & (weight * scale <= MAX_TOTAL)).all()
    ):
        raise ValueError(f"the weights of tensor {name!r} are negative, absurdly large or not finite")
    return weight


def stacked(weights: Weights) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield client, tensor name and array of every forwarded tensor of a payload."""
    for name, array in weights.views().items():
        if name.startswith(STACK):
            client, _, tensor = name.removeprefix(STACK).partition("/")
            yield client, tensor, array
