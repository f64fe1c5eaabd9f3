"""Methods whose clients exchange a vector per class (FD, FedProto), and the class tables of FedKTL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier import lazy, models
from espalier.errors import WireError
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.own_models import OwnModels
from espalier.tasks.base import measuring
from espalier.training.objectives import LocalRound, Objective, Sum
from espalier.wire.class_table import COUNT, MEAN, REPLY, ROUND, TABLE, VECTORS, ClassTable
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import Layouts, Payload, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from espalier.data.imageset import ImageSet
else:
    torch = lazy.load("torch")


class ClassTables(OwnModels):
    """A client sends a vector for each of its classes; servers send all clients the mean and count per class.

    Means and counts merge, so an edge sends the cloud one table for all of its clients. A class without a vector in a
    round has count 0. Between its reports an edge sends its clients its own table.
    """

    newest_only = True
    #: Kind of the vectors, see `espalier.wire.class_table`.
    kind: ClassVar[str]

    def dimension(self) -> int:
        """Return the length of a vector."""
        raise NotImplementedError

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start with an empty table."""
        empty = np.zeros((self.classes, self.dimension()), np.float32)
        table: dict[str, np.ndarray] = {
            MEAN: empty,
            COUNT: np.zeros(self.classes),
            ROUND: np.zeros((), np.int64),
        }
        state.payload = Payload.pack({TABLE: table})

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Report the classes of the vectors."""
        report.table.CopyFrom(table_of(objective).to_proto())

    def reply_layouts(
        self, architecture: pb.ArchitectureSpec, sent: Layouts, names: Sequence[str], report: pb.ClientReport
    ) -> Layouts:
        """Return the layout of a vector for each class of the report."""
        mean = sent[TABLE].get(MEAN) if TABLE in sent else None
        if mean is None:
            raise ValueError("a plan without a class table")
        return {REPLY: table_layout(report, mean.shape)}

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add the vectors of the client's classes, and the round of the table."""
        classes, dimension = server.section(TABLE)[MEAN].shape
        table = table_in(update, self.kind, classes, dimension)
        mean, count = table.dense()
        aggregate.mean({TABLE: {MEAN: mean}}, 1.0, rows={TABLE: {MEAN: count}})
        # Not the server's round: if a window's last round had no participants, the table is from an earlier round.
        made = np.array(update.report.round, np.int64)
        aggregate.mean({TABLE: {ROUND: made}}, 1.0, counted=True)

    def gather(self, window: Aggregate, later: Aggregate) -> Aggregate:
        """Report the newest round's table: the counts of several rounds would include a client several times."""
        return later

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Replace the table by the newest round's; without a reply it does not change."""
        if not aggregate.weight:
            return
        table = server.section(TABLE)
        count = np.broadcast_to(aggregate.weights(MEAN, TABLE).reshape(-1), table[COUNT].shape)
        means = aggregate.means({TABLE: table})
        server.assign({TABLE: {**means.get(TABLE, {}), COUNT: count}})


def table_of(objective: Objective) -> ClassTable:
    """Return the class table that one of an objective's terms made."""
    terms = objective.terms if isinstance(objective, Sum) else (objective,)
    return next(t for t in terms if isinstance(t, TableTerm)).table()


def table_layout(report: pb.ClientReport, shape: tuple[int, ...]) -> Layout:
    """Return the layout of a table's vectors; raises ValueError if its shape does not fit [classes, dimension]."""
    classes, dimension = shape
    rows = len(report.table.labels)
    if not 0 < rows <= classes or report.table.dimension != dimension:
        raise ValueError(
            f"a table of {rows} vectors of length {report.table.dimension}, "
            f"at most {classes} of length {dimension} are expected"
        )
    return Layout((TensorSpec(VECTORS, "float32", (rows, dimension)),))


def table_in(update: Update, kind: str, classes: int, dimension: int) -> ClassTable:
    """Return the table of an update; raises ValueError if it is invalid."""
    try:
        table = ClassTable.from_proto(update.report.table, update.extra[REPLY][VECTORS], update.name)
        return table.validate(update.name, kind=kind, classes=classes, dimension=dimension)
    except WireError as error:
        raise ValueError(error.fault) from error


# --- client ------------------------------------------------------------------------------------------


class TableTerm(Objective):
    """A term that computes a class table of the trained network.

    The table's vectors are the tensor ``VECTORS`` of the reply, its labels and counts a part of the report.
    """

    def table(self) -> ClassTable:
        """Return the client's table, all counts 1; called after training, before `end`."""
        raise NotImplementedError

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the table's vectors, float32 [classes present, D]."""
        return {REPLY: {VECTORS: self.table().vectors}}


def class_table(
    kind: str,
    model: models.Classifier,
    vectors_of: Callable[[Tensor], Tensor],
    local: LocalRound,
    finish: Callable[[Tensor], Tensor] = lambda means: means,
) -> ClassTable:
    """Return the means of a network's output by class, over all of the client's images.

    Computed in evaluation mode, without gradients, in single precision.

    Parameters
    ----------
    kind : str
        Kind of table.
    model : models.Classifier
        On its device.
    vectors_of : callable
        From images [B, channels, size, size] to vectors [B, D].
    local : LocalRound
        Images and batch size.
    finish : callable
        From means float64 [classes present, D] to the table's vectors.
    """
    data, size = local.require_data(), local.settings.batch_size
    device = next(model.parameters()).device
    labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64)).to(device)
    counts = torch.bincount(labels, minlength=model.classes)
    sums: Tensor | None = None
    with measuring(model), torch.no_grad():
        for indices, images in _in_order(data, size, device):
            vectors = vectors_of(images).double()
            if sums is None:
                sums = vectors.new_zeros(model.classes, vectors.shape[1])
            sums.index_add_(0, labels[indices], vectors)
        assert sums is not None
        present = torch.nonzero(counts).flatten()
        means = finish(sums[present] / counts[present, None])
    return ClassTable.of(kind, model.classes, present.cpu().numpy(), means.float().cpu().numpy())


def _in_order(data: ImageSet, size: int, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    for start in range(0, len(data), size):
        indices = np.arange(start, min(start + size, len(data)))
        yield torch.from_numpy(indices).to(device), data.fetch(indices).to(device)
