"""Class tables: a mean vector per class and the number of vectors averaged (FD, FedProto, FedKTL).

Tables can be averaged over clients with different models: an edge merges its clients' tables, the cloud those of the
edges, and a client can remove its own contribution, ``(sum - own) / (count - 1)``. A class without a contribution is
absent, not zero. If the server's map is not linear (FedKTL), rows are stacked instead of averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from espalier.errors import WireError
from espalier.wire.control import SCHEMA
from espalier.wire.sections import SectionId
from espalier_proto import espalier_pb2 as pb

#: Kinds of vectors: distributions over the classes, vectors of any length, vectors of length 1.
SOFT_LABEL, PROTOTYPE, UNIT_PROTOTYPE = "soft-label", "prototype", "unit-prototype"
KINDS = (SOFT_LABEL, PROTOTYPE, UNIT_PROTOTYPE)

#: Section of the table that is sent to clients, and its tensors: means, counts, and the round whose replies were
#: averaged (int64; absent: the previous round).
TABLE = SectionId("table")
MEAN, COUNT, ROUND = "mean", "count", "round"
#: Section of the vectors that a client sends, and its tensor.
REPLY = SectionId("vectors")
VECTORS = "vectors"

#: Tolerance for the sum of a distribution, the norm of a unit vector, and negative probabilities.
TOLERANCE = 1e-4
#: Largest count: above it a float64 does not represent every integer.
MAX_COUNT = 2.0**53


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Vectors by class.

    Attributes
    ----------
    kind : str
        "soft-label", "prototype" or "unit-prototype".
    classes : int
        Number of classes, C.
    labels : numpy.ndarray
        int64 [n], ascending; the classes that are present.
    counts : numpy.ndarray
        float64 [n], the number of contributions that each vector averages; 1 in a client's own table.
    vectors : numpy.ndarray
        float32 [n, D].
    """

    kind: str
    classes: int
    labels: np.ndarray
    counts: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(
        cls,
        kind: str,
        classes: int,
        labels: np.ndarray | Sequence[int],
        vectors: np.ndarray,
        counts: np.ndarray | Sequence[float] | None = None,
    ) -> Self:
        """Return a table with the given rows, converted to the dtypes of a table; counts default to 1."""
        labels = np.asarray(labels, dtype=np.int64)
        counts = np.ones(len(labels)) if counts is None else np.asarray(counts, dtype=np.float64)
        return cls(kind, classes, labels, counts, np.asarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dimension(self) -> int:
        """Length D of a vector."""
        return int(self.vectors.shape[1])

    # --- on the link -------------------------------------------------------------------------------

    def to_proto(self) -> pb.ClassTable:
        """Return the table without its vectors, for the report."""
        return pb.ClassTable(
            schema=SCHEMA,
            kind=self.kind,
            classes=self.classes,
            dimension=self.dimension,
            labels=self.labels.tolist(),
            counts=self.counts.tolist(),
        )

    @classmethod
    def from_proto(cls, message: pb.ClassTable, vectors: np.ndarray, sender: str) -> Self:
        """Read a table; `validate` checks its values.

        Parameters
        ----------
        message : pb.ClassTable
            Kind, classes, labels and counts.
        vectors : numpy.ndarray
            The tensor ``VECTORS`` of the section ``REPLY``.
        sender : str
            Name of the sender, for error messages.

        Raises
        ------
        WireError
            If the message is of another schema, or the tensor is not float32 [labels, dimension].
        """
        if message.schema != SCHEMA:
            raise WireError(sender, f"a class table of schema {message.schema}, this side uses {SCHEMA}")
        labels = np.array(message.labels, dtype=np.int64)
        shape = (len(labels), message.dimension)
        if vectors.dtype != np.float32 or vectors.shape != shape:
            raise WireError(
                sender,
                f"class-table vectors {vectors.dtype} {list(vectors.shape)}, expected float32 {list(shape)}",
            )
        counts = np.array(message.counts, dtype=np.float64)
        return cls(message.kind, message.classes, labels, counts, vectors)

    def validate(self, sender: str, *, kind: str, classes: int, dimension: int = 0) -> Self:
        """Check a received table and return it.

        Parameters
        ----------
        sender : str
            Name of the sender, for error messages.
        kind, classes : str, int
            Kind and number of classes that the run exchanges.
        dimension : int
            Length of the run's vectors; 0: any.

        Raises
        ------
        WireError
            With the first fault in kind, number of classes, dimension, labels, counts or vectors.
        """
        if fault := self._fault(kind, classes, dimension):
            raise WireError(sender, fault)
        return self

    def _fault(self, kind: str, classes: int, dimension: int) -> str:
        if self.kind != kind:
            return f"a class table of kind {self.kind!r}, this run exchanges {kind!r}"
        if self.classes != classes:
            return f"a class table of {self.classes} classes, this run has {classes}"
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.labels):
            return f"class-table vectors of shape {list(self.vectors.shape)} for {len(self.labels)} labels"
        wanted = classes if kind == SOFT_LABEL else dimension
        if wanted and self.dimension != wanted:
            return f"class-table vectors of dimension {self.dimension}, this run's have {wanted}"
        return self._labels_fault() or self._counts_fault() or self._vectors_fault()

    def _labels_fault(self) -> str:
        if ((self.labels < 0) | (self.labels >= self.classes)).any():
            wrong = self.labels[(self.labels < 0) | (self.labels >= self.classes)][0]
            return f"a class table with label {wrong}, labels go from 0 to {self.classes - 1}"
        steps = np.diff(self.labels)
        if (steps < 0).any():
            return f"a class table whose labels are unsorted (label {self.labels[1:][steps < 0][0]})"
        if (steps == 0).any():
            return f"a class table with label {self.labels[1:][steps == 0][0]} repeated"
        return ""

    def _counts_fault(self) -> str:
        if self.counts.shape != self.labels.shape:
            return f"a class table of {len(self.counts)} counts for {len(self.labels)} labels"
        # "not (a and b)" also catches NaN, which compares false with everything.
        wrong = ~((self.counts > 0) & (self.counts <= MAX_COUNT))
        if wrong.any():
            label, count = self.labels[wrong][0], self.counts[wrong][0]
            return f"a class table with the count {count:g} for class {label}; a count is positive and finite"
        return ""

    def _vectors_fault(self) -> str:
        wrong = ~np.isfinite(self.vectors).all(axis=1)
        if wrong.any():
            return f"a class table with a vector of class {self.labels[wrong][0]} that is not finite"
        if self.kind == SOFT_LABEL:
            sums = self.vectors.sum(axis=1, dtype=np.float64)
            wrong = (self.vectors < -TOLERANCE).any(axis=1) | (np.abs(sums - 1) > TOLERANCE)
            if wrong.any():
                return f"a soft label of class {self.labels[wrong][0]} that is not a distribution"
        if self.kind == UNIT_PROTOTYPE:
            norms = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
            wrong = np.abs(norms - 1) > TOLERANCE
            if wrong.any():
                label, norm = self.labels[wrong][0], norms[wrong][0]
                return f"a prototype of class {label} of norm {norm:.6g}, this run's have norm 1"
        return ""

    # --- merging ---------------------------------------------------------------------------------

    def without(self, own: ClassTable) -> Self:
        """Return the means without some contributions, ``(sum - own) / (count - own count)``.

        Parameters
        ----------
        own : ClassTable
            A table that was merged into this one. If it is a client's, with counts of 1, the result is the
            leave-one-out mean of Jeong et al. (2018) over the other contributors of a class.

        Returns
        -------
        ClassTable
            Classes with less than one remaining contribution are absent.
        """
        self._check_same(own)
        sums, counts = self._sums()
        own_sums, own_counts = own._sums()
        left = self._from_sums(sums - own_sums, counts - own_counts, least=1.0)
        if self.kind != SOFT_LABEL:
            return left
        # Rounding errors of the sums can make a probability slightly negative, and the loss unbounded.
        vectors = np.maximum(left.vectors, 0.0)
        return replace(left, vectors=vectors / vectors.sum(axis=1, keepdims=True))

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors as float32 [C, D] and the counts as float64 [C]; both 0 for absent classes."""
        mean = np.zeros((self.classes, self.dimension), np.float32)
        count = np.zeros(self.classes)
        mean[self.labels], count[self.labels] = self.vectors, self.counts
        return mean, count

    @classmethod
    def from_dense(cls, kind: str, mean: np.ndarray, count: np.ndarray) -> Self:
        """Return the table for the result of `dense`: classes with a positive count are present."""
        present = np.flatnonzero(count > 0)
        return cls.of(kind, len(count), present, mean[present], count[present])

    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sums float64 [C, D] and counts float64 [C]."""
        sums, counts = np.zeros((self.classes, self.dimension)), np.zeros(self.classes)
        sums[self.labels] = self.vectors.astype(np.float64) * self.counts[:, None]
        counts[self.labels] = self.counts
        return sums, counts

    def _from_sums(self, sums: np.ndarray, counts: np.ndarray, least: float = 0.0) -> Self:
        present = np.flatnonzero((counts >= least) & (counts > 0))
        means = sums[present] / counts[present, None]
        return self.of(self.kind, self.classes, present, means, counts[present])

    def _check_same(self, other: ClassTable) -> None:
        mine, others = (self.kind, self.classes, self.dimension), (other.kind, other.classes, other.dimension)
        if mine != others:
            raise ValueError(f"class tables of different form: {mine} and {others}")


def merge(tables: Iterable[ClassTable]) -> ClassTable:
    """Return the table of all contributions: sums and counts are added per class.

    Parameters
    ----------
    tables : iterable of ClassTable
        At least one, all of the same kind, number of classes and dimension.

    Raises
    ------
    ValueError
        If there is no table, they differ in form, or they have unit vectors, whose mean is not a unit vector: stack
        their rows instead.
    """
    first, *rest = tables
    if first.kind == UNIT_PROTOTYPE:
        raise ValueError("unit prototypes are stacked, not added")
    sums, counts = first._sums()
    for table in rest:
        first._check_same(table)
        more, more_counts = table._sums()
        sums += more
        counts += more_counts
    return first._from_sums(sums, counts)


def given_arrays(table: ClassTable, round_: int) -> dict[str, np.ndarray]:
    """Return the tensors of the section ``TABLE``: ``MEAN``, ``COUNT`` and ``ROUND``.

    Parameters
    ----------
    table : ClassTable
        The merged table.
    round_ : int
        The round whose replies were merged: a client that replied in it removes its own contribution.
    """
    mean, count = table.dense()
    return {MEAN: mean, COUNT: count, ROUND: np.array(round_, np.int64)}


def given_table(arrays: Mapping[str, np.ndarray], kind: str, classes: int, sender: str) -> ClassTable | None:
    """Read the tensors of `given_arrays`; None if no table has been sent yet.

    Raises
    ------
    WireError
        If means and counts do not match, or `ClassTable.validate` finds a fault.
    """
    if MEAN not in arrays:
        return None
    mean, count = arrays[MEAN], arrays.get(COUNT)
    if mean.ndim != 2 or mean.dtype != np.float32 or count is None or mean.shape[:1] != count.shape:
        raise WireError(sender, f"a class table of shape {list(mean.shape)} without as many counts")
    if not (np.isfinite(count) & (count >= 0)).all():
        raise WireError(sender, "a class table with a count that is negative or not finite")
    if not count.any():
        return None
    return ClassTable.from_dense(kind, mean, count).validate(sender, kind=kind, classes=classes)
