"""What methods share whose clients exchange a vector per class: FD and FedProto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier.errors import WireError
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.own_models import OwnModels
from espalier.methods.tally import Tally
from espalier.wire.class_table import COUNT, MEAN, ROUND, VECTORS, ClassTable
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.objectives import Objective


class ClassTables(OwnModels):
    """A client sends a vector for each of its classes; servers give everybody the mean and count per class.

    Means and counts merge, so an edge sends the cloud one table, however many clients it has. A class
    that nobody sent in a round has count 0 and is absent. Between its reports an edge gives its clients the
    table of its own.
    """

    newest_only = True
    #: What the vectors are, see `espalier.wire.class_table`.
    kind: ClassVar[str]

    def dimension(self) -> int:
        """Return the length of a vector."""
        raise NotImplementedError

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start with an empty table."""
        empty = np.zeros((self.classes, self.dimension()), np.float32)
        state.weights = Weights.pack(
            {MEAN: empty, COUNT: np.zeros(self.classes), ROUND: np.zeros((), np.int64)}
        )

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Say which classes the vectors are of."""
        report.table.CopyFrom(table_of(objective).to_proto())

    def reply_layout(
        self, architecture: pb.ArchitectureSpec, sent: Layout, names: Sequence[str], report: pb.ClientReport
    ) -> Layout:
        """Return a vector for each class that the report names."""
        return table_layout(report, sent.only([MEAN]).tensors[0].shape)

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add the vectors of the classes that the client has, and the round they are of."""
        classes, dimension = server.tensors[MEAN].shape
        table = table_in(update, self.kind, classes, dimension)
        mean, count = table.dense()
        tally.mean({MEAN: mean}, 1.0, rows={MEAN: count})
        # Not the server's round: where a window's last round came to nothing, the table is an earlier one's.
        tally.mean({ROUND: np.array(update.report.round, np.int64)}, 1.0, beside=True)

    def gather(self, window: Tally, later: Tally) -> Tally:
        """Report the newest round's table: counts of several rounds would count a client several times."""
        return later

    def step(self, server: ServerState, tally: Tally) -> None:
        """Take the newest round's table in the place of the former one; without a reply there is none."""
        if not tally.weight:
            return
        count = np.broadcast_to(tally.weights(MEAN).reshape(-1), server.tensors[COUNT].shape)
        server.assign(tally.means(server.tensors) | {COUNT: count})


def table_of(objective: Objective) -> ClassTable:
    """Return the class table that one of an objective's terms made."""
    from espalier.training.knowledge import TableTerm
    from espalier.training.objectives import Sum

    terms = objective.terms if isinstance(objective, Sum) else (objective,)
    return next(t for t in terms if isinstance(t, TableTerm)).table()


def table_layout(report: pb.ClientReport, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a table's vectors; raises ValueError where it cannot be of [classes, dimension]."""
    classes, dimension = shape
    rows = len(report.table.labels)
    if not 0 < rows <= classes or report.table.dimension != dimension:
        raise ValueError(
            f"a table of {rows} vectors of length {report.table.dimension}, "
            f"at most {classes} of length {dimension} are expected"
        )
    return Layout((TensorSpec(VECTORS, "float32", (rows, dimension)),))


def table_in(update: Update, kind: str, classes: int, dimension: int) -> ClassTable:
    """Return the table of an update; raises ValueError where it is unsound."""
    try:
        table = ClassTable.from_proto(update.report.table, update.extra[VECTORS], update.name)
        return table.validate(update.name, kind=kind, classes=classes, dimension=dimension)
    except WireError as error:
        raise ValueError(error.fault) from error
