"""What the record and the events of a window take from the edges' reports."""

from __future__ import annotations

from espalier_proto import espalier_pb2 as pb
from espalier_server.contributions import SignatureCounts
from espalier_server.records.window_entries import client_trainings, signature_entry
from espalier_server.window_outcome import WindowOutcome


def test_a_clients_training_is_its_last_round_and_the_sums_of_the_window() -> None:
    reports = {edge: pb.EdgeReport(edge=edge) for edge in ("e1", "e2")}
    # The client moves from e2 to e1 between the rounds.
    for edge, round_, loss, seconds in (("e1", 2, 0.25, 4.0), ("e2", 1, 0.5, 3.0)):
        record = reports[edge].rounds.add(round=round_)
        record.clients.add(client="c1", loss=loss, steps=10 * round_, seconds=seconds, cpu_seconds=1.0)
    [(name, training)] = client_trainings(WindowOutcome(reports)).items()
    assert name == "c1"
    assert training == {
        "loss": 0.25,
        "steps": 20,
        "seconds": 4.0,
        "rounds": 2,
        "total_seconds": 7.0,
        "total_cpu_seconds": 2.0,
    }


def test_unsigned_clients_are_sorted() -> None:
    outcome = WindowOutcome(signatures=SignatureCounts(edges=3, cloud=2, unsigned={"c2", "c1"}))
    entry = signature_entry(outcome)
    assert (entry.edges, entry.cloud, entry.unsigned) == (3, 2, ["c1", "c2"])
