"""Aggregation of updates: weighted means, sums, stacked rows and forwarded tensors, merged from edges to the cloud."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from espalier.methods.accumulate import add_scaled
from espalier.wire.payload import STORED_AS, Layout, TensorSpec, Weights
from espalier.wire.sections import MODEL, Layouts, Payload, SectionId, Sections

#: Records of an edge's report besides those of the means.
WEIGHTS, SUMS, ROWS, FORWARDED = "weights", "sums", "rows", "forwarded"
#: Section of the stacked rows.
ROWS_SECTION = SectionId("rows", record=ROWS)
#: Names of the scalars of an edge's report: the total weight, and the prefix of counts.
NOMINAL, COUNT = "weight", "count/"

Arrays = Mapping[str, np.ndarray]
#: A client's forwarded tensors by section and name.
Forwarded = Mapping[SectionId, Mapping[str, np.ndarray]]
Key = tuple[SectionId, str]

#: Largest weight of one update, and of an edge's total: the product with the largest accepted value
#: (`espalier.wire.payload.LARGEST`) fits into a float32.
MAX_WEIGHT, MAX_TOTAL = 1e15, 1e18


class Aggregate:
    """Mergeable sums over updates: merging the edges' aggregates at the cloud gives the aggregate over all clients.

    A mean has a weight per coordinate: a client may have only a leading slice ``w[:d0, :d1]`` of a tensor, or only
    some tensors; a coordinate that no client has trained has no mean. Integer tensors (counters) are reduced by the
    element-wise maximum, which does not depend on the order and yields an integer.

    Parameters
    ----------
    layouts : mapping of SectionId to Layout
        The server's tensors.

    Attributes
    ----------
    weight : float
        Total weight of the updates in the means.
    counts : dict[str, float]
        Scalars that are summed.
    forwarded : dict[str, dict[SectionId, dict[str, np.ndarray]]]
        Tensors forwarded unaggregated, by client and section.
    """

    def __init__(self, layouts: Layouts) -> None:
        self.weight = 0.0
        self.counts: dict[str, float] = {}
        self.forwarded: dict[str, dict[SectionId, dict[str, np.ndarray]]] = {}
        self._server: dict[Key, TensorSpec] = {
            (section, t.name): t for section, layout in layouts.items() for t in layout.tensors
        }
        self._weighted: dict[Key, np.ndarray] = {}
        self._weights: dict[Key, np.ndarray] = {}
        self._sums: dict[Key, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}

    # --- adding ------------------------------------------------------------------------------------

    def mean(
        self,
        sections: Sections,
        weight: float,
        rows: Sections | None = None,
        *,
        counted: bool = False,
    ) -> None:
        """Add tensors to the weighted means.

        Parameters
        ----------
        sections : mapping of SectionId to mapping of str to array
            Whole tensors of the server, or leading slices of them, by section.
        weight : float
            Their weight, not negative; with 0 nothing is added.
        rows : mapping of SectionId to mapping of str to array, optional
            Masks of the rows to average, for tensors of which not all rows are: bool [rows of the slice].
        counted : bool
            Whether `weight` has been added to the total by an earlier call for the same update.

        Raises
        ------
        ValueError
            If the server has no such tensor, or a smaller one or one of another kind of dtype, or the weight is
            negative, above `MAX_WEIGHT` or not finite. Nothing is added then.
        """
        if not 0 <= weight <= MAX_WEIGHT:  # NaN fails here, too
            raise ValueError(f"the aggregation weight {weight}")
        arrays = _flat(sections)
        self._check(arrays)
        if weight == 0:
            return
        masks = _flat(rows or {})
        weights = {
            key: _coordinate_weights(key[1], a.shape, self._server[key].shape, weight, masks.get(key))
            for key, a in arrays.items()
        }
        self.weight += 0.0 if counted else weight
        for key, array in arrays.items():
            self._add_mean(key, array, weights[key])

    def sum(self, sections: Sections, factor: float = 1.0) -> None:
        """Add ``factor`` times tensors (whole or leading slices) to the sums; raises like :meth:`mean`."""
        arrays = _flat(sections)
        self._check(arrays)
        for key, array in arrays.items():
            self._add_sum(key, array, factor)

    def count(self, name: str, value: float) -> None:
        """Add to a scalar."""
        self.counts[name] = self.counts.get(name, 0.0) + value

    def rows(self, arrays: Arrays) -> None:
        """Append the rows of a client, without its name; all arrays have the same number of rows."""
        if len({a.shape[:1] for a in arrays.values()}) > 1 or (self._rows and set(arrays) != set(self._rows)):
            raise ValueError(f"rows {sorted(arrays)} of different lengths, or with other names than before")
        for name, array in arrays.items():
            first = self._rows.get(name, [array])[0] if array.ndim else None
            if first is None or first.dtype != array.dtype or first.shape[1:] != array.shape[1:]:
                raise ValueError(f"rows {name!r} of {array.dtype}{list(array.shape[1:])}, unlike the others")
        for name, array in arrays.items():
            self._rows.setdefault(name, []).append(array)

    def forward(self, client: str, sections: Sections) -> None:
        """Add tensors of a client that are forwarded to the cloud unaggregated."""
        own = self.forwarded.setdefault(client, {})
        for section, arrays in sections.items():
            own[section] = {**own.get(section, {}), **arrays}

    # --- reading -----------------------------------------------------------------------------------

    def means(self, previous: Sections) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the mean of every aggregated tensor; coordinates that no client has are taken from `previous`."""
        found: dict[SectionId, dict[str, np.ndarray]] = {}
        for section, name in self._weighted:
            mean = self._mean((section, name), previous.get(section, {}))
            found.setdefault(section, {})[name] = mean
        return found

    def _mean(self, key: Key, previous: Arrays) -> np.ndarray:
        total, weight = self._weighted[key], self._weights[key]
        has_mean = weight > 0
        mean = total
        if total.dtype.kind == "f":
            mean = total / np.where(has_mean, weight, 1).astype(total.dtype)
        if not has_mean.all():
            mean = np.where(has_mean, mean, previous[key[1]])
        return mean.astype(STORED_AS[self._server[key].dtype], copy=False)

    def held(self, name: str, section: SectionId = MODEL) -> np.ndarray:
        """Return which coordinates of a tensor have a mean; bool, broadcasts to the tensor's shape."""
        return np.asarray(self.weights(name, section) > 0)

    def weights(self, name: str, section: SectionId = MODEL) -> np.ndarray:
        """Return the total weight of each coordinate of a mean; broadcasts to the tensor's shape."""
        return self._weights.get((section, name), np.zeros(()))

    def stacked_rows(self) -> dict[str, np.ndarray]:
        """Return the stacked rows by name, sorted by value, so that their order does not identify a client."""
        joined = {name: np.concatenate(parts) for name, parts in sorted(self._rows.items())}
        columns = [c for a in joined.values() for c in a.reshape(len(a), -1).T]
        order = np.lexsort(columns[::-1]) if columns else np.zeros(0, np.int64)
        return {name: a[order] for name, a in joined.items()}

    def sums(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the sums by section and name."""
        return _nested(self._sums)

    # --- merging -----------------------------------------------------------------------------------

    def report(self, previous: Sections | None = None) -> tuple[Payload, dict[str, float]]:
        """Return an edge's report to the cloud: a payload and scalars.

        The means are in the records of their sections, the rest in the records `WEIGHTS`, `SUMS`, `ROWS` and
        `FORWARDED`. Coordinates that no client has are taken from `previous`; without it they are the neutral element
        of the sum or the maximum.
        """
        weights = {
            key: np.array(weight)
            for key, weight in self._weights.items()
            if not (weight.size == 1 and float(weight.flat[0]) == self.weight)
        }
        others: dict[SectionId, Arrays] = {
            **{s._replace(record=WEIGHTS): arrays for s, arrays in _nested(weights).items()},
            **{s._replace(record=SUMS): arrays for s, arrays in self.sums().items()},
            **{
                SectionId(section.name, client, FORWARDED): arrays
                for client, own in self.forwarded.items()
                for section, arrays in own.items()
            },
        }
        if rows := self.stacked_rows():
            others[ROWS_SECTION] = rows
        layouts = {
            section: Layout(tuple(self._server[section, n] for n in totals))
            for section, totals in _nested(self._weighted).items()
        } | {section: Layout.of(arrays) for section, arrays in others.items()}
        payload = Payload({section: Weights.empty(layout) for section, layout in layouts.items()})
        views = payload.views()
        # One mean at a time, so that the means do not take the memory of another model.
        for key, total in self._weighted.items():
            section, name = key
            before = {name: _lowest(total.dtype)} if previous is None else previous.get(section, {})
            views[section][name][...] = self._mean(key, before)
        for section, arrays in others.items():
            for name, array in arrays.items():
                views[section][name][...] = array
        return payload, {NOMINAL: self.weight} | {COUNT + name: v for name, v in self.counts.items()}

    def absorb(self, report: Payload, scalars: Mapping[str, float], scale: float = 1.0) -> None:
        """Merge an edge's report.

        Parameters
        ----------
        report : Payload
            The sections of the report.
        scalars : mapping of str to float
            The scalars of the report.
        scale : float
            Factor on the weights of the means; sums and counts are not scaled.

        Raises
        ------
        ValueError
            If a section or tensor is unexpected, has another shape or dtype, or a weight is invalid.
        """
        parts: dict[str, dict[SectionId, dict[str, np.ndarray]]] = {
            record: {} for record in ("", WEIGHTS, SUMS, ROWS, FORWARDED)
        }
        for section, arrays in report.views().items():
            if section.record not in parts:
                raise ValueError(f"the unknown record {section.record!r}")
            parts[section.record][section._replace(record="")] = arrays
        rows = parts[ROWS].pop(ROWS_SECTION._replace(record=""), {})
        if parts[ROWS]:
            raise ValueError(f"the unknown section {min(parts[ROWS])} of rows")
        nominal = scalars.get(NOMINAL, 0.0)
        if not (0 <= nominal <= MAX_TOTAL and 0 <= nominal * scale <= MAX_TOTAL):
            raise ValueError(f"the aggregation weight {nominal}")
        means, given, sums = _flat(parts[""]), _flat(parts[WEIGHTS]), _flat(parts[SUMS])
        self._check(means, whole=True)
        self._check(sums, whole=True)
        if unknown := given.keys() - means.keys():
            section, name = min(unknown)
            raise ValueError(f"weights of tensor {name!r} in {section}, which has no mean")
        if bad := [n for n, v in scalars.items() if n.startswith(COUNT) and not math.isfinite(v)]:
            raise ValueError(f"the count {bad[0].removeprefix(COUNT)!r} is not finite")
        weights = {
            key: _checked_weight(key[1], a, given.get(key, np.asarray(nominal)), scale)
            for key, a in means.items()
        }
        if rows:  # first, because it may raise, and then nothing must have been added
            self.rows(rows)
        for key, array in means.items():
            self._add_mean(key, array, weights[key] * scale)
        self.weight += nominal * scale
        for key, array in sums.items():
            self._add_sum(key, array, 1.0)
        for name, value in scalars.items():
            if name.startswith(COUNT):
                self.count(name.removeprefix(COUNT), value)
        for section, arrays in parts[FORWARDED].items():
            self.forward(section.member, {SectionId(section.name): arrays})

    def extend(self, later: Aggregate) -> None:
        """Add a later round of the same window.

        Sums, counts and weights are added. A mean is replaced by the later round's if that has one, because the later
        round continues from this one.
        """
        for key, total in later._weighted.items():
            if key not in self._weighted:
                self._weighted[key], self._weights[key] = total, later._weights[key]
                continue
            mine, theirs = self._weights[key], later._weights[key]
            if total.dtype.kind == "f":
                scale = np.where(theirs > 0, (mine + theirs) / np.where(theirs > 0, theirs, 1), 0)
                replaced = np.broadcast_to(theirs > 0, total.shape)
                self._weighted[key] = np.where(
                    replaced, total * scale.astype(total.dtype), self._weighted[key]
                )
            else:
                self._weighted[key] = np.maximum(self._weighted[key], total)
            self._weights[key] = mine + theirs
        self.weight += later.weight
        for key, array in later._sums.items():
            self._add_sum(key, array, 1.0)
        for count, value in later.counts.items():
            self.count(count, value)
        if later._rows:
            self._rows = dict(later._rows)
        for client, own in later.forwarded.items():
            self.forwarded[client] = dict(own)

    # --- internals ------------------------------------------------------------------------------------

    def _check(self, arrays: Mapping[Key, np.ndarray], whole: bool = False) -> None:
        for key, array in arrays.items():
            section, name = key
            spec = self._server.get(key)
            where = f"tensor {name!r}" if section == MODEL else f"tensor {name!r} of {section}"
            if spec is None:
                raise ValueError(f"{where} is not one of the server's")
            if spec.dtype == "bfloat16":
                raise ValueError(f"{where} is bfloat16, which cannot be averaged")
            if array.dtype.kind != STORED_AS[spec.dtype].kind:
                raise ValueError(f"{where} is {array.dtype}, the server's is {spec.dtype}")
            fits = len(array.shape) == len(spec.shape) and all(
                a <= b for a, b in zip(array.shape, spec.shape, strict=True)
            )
            if not fits or (whole and array.shape != spec.shape) or array.shape[2:] != spec.shape[2:]:
                raise ValueError(f"{where} has shape {list(array.shape)}, the server's is {list(spec.shape)}")

    def _add_mean(self, key: Key, array: np.ndarray, weight: np.ndarray) -> None:
        """Add weight·array; the weight is 0 outside the leading slice that the array covers."""
        region = _region(array.shape)
        if key not in self._weighted:
            dtype = _sum_dtype(array.dtype)
            self._weighted[key] = np.full(self._server[key].shape, _lowest(dtype))
            self._weights[key] = np.zeros((), np.float64)
        total = self._weighted[key]
        if total.dtype.kind == "f":
            if weight.ndim:
                factor = weight[tuple(slice(0, n) for n in array.shape[: weight.ndim])]
                total[region] += factor.astype(total.dtype) * array
            else:
                add_scaled(total[region], float(weight), array)
        else:
            np.maximum(total[region], array, out=total[region])
        self._weights[key] = self._weights[key] + weight

    def _add_sum(self, key: Key, array: np.ndarray, factor: float) -> None:
        if key not in self._sums:
            self._sums[key] = np.zeros(self._server[key].shape, _sum_dtype(array.dtype))
        part = self._sums[key][_region(array.shape)]
        if part.dtype.kind == "f":
            add_scaled(part, factor, array)
        else:
            part += part.dtype.type(factor) * array


def _flat(sections: Sections) -> dict[Key, np.ndarray]:
    return {(section, name): array for section, arrays in sections.items() for name, array in arrays.items()}


def _nested(arrays: Mapping[Key, np.ndarray]) -> dict[SectionId, dict[str, np.ndarray]]:
    found: dict[SectionId, dict[str, np.ndarray]] = {}
    for (section, name), array in arrays.items():
        found.setdefault(section, {})[name] = array
    return found


def _region(shape: Iterable[int]) -> tuple[Any, ...]:
    # With the ellipsis, indexing a 0-d array (a counter) returns a view instead of a scalar.
    return (*(slice(0, n) for n in shape), ...)


def _sum_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Return the dtype to sum in: float32 for float16, else the same."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _lowest(dtype: np.dtype[np.generic]) -> np.ndarray:
    """Return the neutral element: of the sum for floats, of the maximum for integers."""
    return np.array(0 if dtype.kind in "fub" else np.iinfo(str(dtype)).min, dtype)


def _coordinate_weights(
    name: str, part: tuple[int, ...], whole: tuple[int, ...], weight: float, rows: np.ndarray | None
) -> np.ndarray:
    """Return the weight of each coordinate: a scalar for a whole tensor, else an array over rows and columns."""
    if part == whole and rows is None:
        return np.asarray(weight)
    if rows is not None and rows.shape != part[:1]:
        raise ValueError(f"tensor {name!r} has shape {list(part)}, {rows.size} entries in its row mask")
    # An axis is expanded only if weights differ along it, because they are sent in the edge's report.
    differ = [part[i] != whole[i] or (i == 0 and rows is not None) for i in range(min(2, len(whole)))]
    shape = [whole[i] if d else 1 for i, d in enumerate(differ)] + [1] * (len(whole) - 2)
    found = np.zeros(shape)
    covered = found[_region(part[:2])]
    covered[...] = weight if rows is None else (weight * rows).reshape(-1, *(1,) * (found.ndim - 1))
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
        raise ValueError(f"the weights of tensor {name!r} are negative, too large or not finite")
    return weight


def forwarded_in(report: Payload) -> dict[str, dict[SectionId, dict[str, np.ndarray]]]:
    """Return the forwarded tensors of an edge's report by client and section."""
    found: dict[str, dict[SectionId, dict[str, np.ndarray]]] = {}
    for section, weights in report.items():
        if section.record == FORWARDED:
            found.setdefault(section.member, {})[SectionId(section.name)] = weights.views()
    return found


def rows_in(report: Payload) -> dict[str, np.ndarray]:
    """Return the stacked rows of an edge's report by name."""
    return report[ROWS_SECTION].views() if ROWS_SECTION in report else {}
