"""Any Flower app over the tree: a plain message goes to the clients, their replies become one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from espalier.errors import UNSOUND, WireError, unsound
from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier.flower.resident import RUN_RECORD
from espalier.wire.control import NUM_EXAMPLES
from espalier.wire.hello import MAX_SAMPLES
from espalier.wire.payload import fault_of
from espalier_edge.fleet.server import InlineGrid

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)


def run_record(run: str, run_config: Mapping[str, Any]) -> ConfigRecord:
    """Pack the id and configuration of a run into a record, which an Espalier client moves to its Context."""
    return ConfigRecord({"run": run, "config": json.dumps(dict(run_config)).encode()})


def _of_type(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """Return the records of one type; Flower's own properties create a reference cycle that retains the payload."""
    return {name: record for name, record in content.items() if isinstance(record, kind)}


class ReplySum:
    """A running sum of replies to plain Flower messages, weighted by `num-examples`.

    Arrays and metrics become means weighted by `num-examples`, which itself is summed. Replies
    without `num-examples` pass only if they are all equal, because there is no weight to add them
    up by.
    """

    def __init__(self) -> None:
        self.replies = 0
        self.examples = 0.0
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        self._metrics: dict[str, dict[str, Any]] = {}
        self._configs: dict[str, ConfigRecord] | None = None
        self._equal: RecordDict | None = None

    def add(self, content: RecordDict, sender: str) -> None:
        """Add one reply.

        Raises
        ------
        WireError
            If it does not have the records, keys and shapes of the replies before it, or has no
            `num-examples` and differs from them.
        """
        examples = self._examples(content, sender)
        if examples is None or self._equal is not None:
            self._add_equal(content, sender, examples)
            return
        try:
            arrays = {
                name: {key: numpy_view(array) for key, array in record.items()}
                for name, record in _of_type(content, ArrayRecord).items()
            }
            metrics = {name: dict(record) for name, record in _of_type(content, MetricRecord).items()}
            configs = _of_type(content, ConfigRecord)
            self._check(arrays, metrics, configs, sender)
            # Compute everything before updating, so that a reply refused half-way leaves the sums unchanged.
            sums = {n: self._added(r, self._arrays.get(n, {}), examples) for n, r in arrays.items()}
            totals = {n: self._added(r, self._metrics.get(n, {}), examples) for n, r in metrics.items()}
        except UNSOUND as error:
            raise WireError(sender, unsound(error)) from error
        self._arrays, self._metrics = sums, totals
        self._configs = configs
        self.examples += examples
        self.replies += 1

    @staticmethod
    def _added(values: Mapping[str, Any], sums: Mapping[str, Any], examples: float) -> dict[str, np.ndarray]:
        """Return the sums including a reply's values; raises ValueError if they cannot be added."""
        found = {}
        for key, value in values.items():
            part = np.asarray(value)
            if part.dtype.kind not in "fiub" or (part.dtype.kind == "f" and (fault := fault_of(part))):
                raise ValueError(f"{key!r} holds {fault if part.dtype.kind == 'f' else part.dtype}")
            # Otherwise NumPy would broadcast a number along a list.
            if key in sums and sums[key].shape != part.shape:
                raise ValueError(f"{key!r} has another shape than the others'")
            scaled = part * (1 if key == NUM_EXAMPLES else examples)
            found[key] = sums[key] + scaled if key in sums else scaled
        return found

    def content(self) -> RecordDict:
        """Return the aggregated reply.

        Raises
        ------
        WireError
            If no client replied, or all replies have `num-examples` 0.
        """
        if self.replies == 0:
            raise WireError("clients", "none of them gave a usable reply")
        if self._equal is not None:
            return self._equal
        if not self.examples:
            raise WireError("clients", f"all of their replies have {NUM_EXAMPLES}=0, so they have no mean")
        result = RecordDict()
        for name, sums in self._arrays.items():
            result[name] = ArrayRecord({k: self._array(v / self.examples) for k, v in sums.items()})
        for name, totals in self._metrics.items():
            result[name] = MetricRecord({k: self._metric(k, v) for k, v in totals.items()})
        for name, config in (self._configs or {}).items():
            result[name] = config
        return result

    @staticmethod
    def _array(mean: np.ndarray) -> Array:
        return array_from_numpy(np.ascontiguousarray(mean))

    def _metric(self, key: str, total: np.ndarray) -> Any:
        if key == NUM_EXAMPLES:
            return total.item()
        mean = total / self.examples
        return mean.item() if mean.ndim == 0 else mean.tolist()

    @staticmethod
    def _examples(content: RecordDict, sender: str) -> float | None:
        """Return `num-examples` of a reply, None if it has none."""
        metrics = _of_type(content, MetricRecord)
        found = [r[NUM_EXAMPLES] for r in metrics.values() if NUM_EXAMPLES in r]
        if not found:
            return None
        if len(found) > 1 or not isinstance(found[0], int | float) or not 0 <= found[0] <= MAX_SAMPLES:
            raise WireError(sender, f"{NUM_EXAMPLES} is {found}, expected one number from 0 to {MAX_SAMPLES}")
        return float(found[0])

    def _add_equal(self, content: RecordDict, sender: str, examples: float | None) -> None:
        if self.replies and (self._equal is None or examples is not None):
            raise WireError(
                sender,
                f"its reply has {'no ' if examples is None else ''}{NUM_EXAMPLES}, unlike the others'",
            )
        if self._equal is not None and self._equal != content:
            raise WireError(
                sender, f"its reply differs from the others' and has no {NUM_EXAMPLES} to add it up by"
            )
        self._equal = content
        self.replies += 1

    def _check(
        self,
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        metrics: Mapping[str, Mapping[str, Any]],
        configs: Mapping[str, ConfigRecord],
        sender: str,
    ) -> None:
        if self.replies == 0:
            return
        expected = {n: {k: v.shape for k, v in r.items()} for n, r in self._arrays.items()}
        got = {n: {k: v.shape for k, v in r.items()} for n, r in arrays.items()}
        if got != expected:
            raise WireError(sender, "its arrays have other names or shapes than the others'")
        if {n: set(r) for n, r in metrics.items()} != {n: set(r) for n, r in self._metrics.items()}:
            raise WireError(sender, "its metrics have other names than the others'")
        if dict(configs) != (self._configs or {}):
            raise WireError(sender, "its config records differ from the others'")


def relay(
    message: Message, grid: InlineGrid, record: ConfigRecord, deadline: float
) -> tuple[RecordDict, list[str]]:
    """Send a plain message to every client and combine the replies.

    Parameters
    ----------
    message : Message
        What the cloud's ServerApp sent.
    grid : InlineGrid
        The run's grid.
    record : ConfigRecord
        The run's configuration (:func:`run_record`).
    deadline : float
        Seconds to wait; late clients are left out.

    Returns
    -------
    tuple
        The summed content, and a line for every client that gave no usable reply.

    Raises
    ------
    WireError
        If no client is connected or none gave a usable reply.
    """
    nodes = list(grid.get_node_ids())
    if not nodes:
        raise WireError("clients", "none is connected to this edge")
    content = RecordDict(dict(message.content.items()))
    content[RUN_RECORD] = record

    def messages() -> Iterator[Message]:
        for node_id in nodes:
            yield Message(content, node_id, message.metadata.message_type, group_id=message.metadata.group_id)

    total = ReplySum()
    faults = []
    answered = set()
    for reply in grid.exchange(messages(), deadline=deadline):
        sender = f"node {reply.metadata.src_node_id}"
        answered.add(reply.metadata.src_node_id)
        try:
            if reply.has_error():
                raise WireError(sender, f"an error instead of a reply: {reply.error.reason}")
            total.add(reply.content, sender)
        except WireError as error:
            faults.append(str(error))
    faults += [f"node {n}: no reply within {deadline:g} s" for n in nodes if n not in answered]
    if total.replies == 0 and faults:
        raise WireError("clients", "none of them gave a usable reply; " + "; ".join(faults[:3]))
    return total.content(), faults
