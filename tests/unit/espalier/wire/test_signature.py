"""Signed updates in whole trees: what a client, an edge or a third party alters is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bench.local_tree import LocalTree
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.flower.node_state import load_key
from espalier.security.keys import CLIENT_KEYS, KeyRegistry
from espalier.wire import control
from espalier.wire.signature import mismatch, sign, verify
from espalier_proto import espalier_pb2 as pb
from espalier_server.client_keys import ClientKeys
from espalier_server.contributions import check_contributions
from espalier_server.run import TreeRun
from tests.support.by_hand import run_tree, small_tree

STRANGER = ec.generate_private_key(ec.SECP256R1())


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# --- a statement -----------------------------------------------------------------------------------------

STATEMENT = pb.UpdateStatement(
    schema=control.SCHEMA,
    run="r",
    window=2,
    round=3,
    client="c",
    edge="e",
    nonce=b"n" * 16,
    samples=30,
    architecture=b"a" * 32,
    payload=b"p" * 32,
    form=b"f" * 32,
    report=b"r" * 32,
)
SIGNED = sign(STATEMENT, STRANGER)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_what_was_signed_comes_back(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    made = [sign(STATEMENT, key) for _ in range(8)]
    assert all(verify(one, public(key), "c") == STATEMENT for one in made)
    # The size of a reply must not hang on chance.
    assert len({one.ByteSize() for one in made}) == 1


@given(st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    where = data.draw(st.sampled_from(["statement", "signature"]))
    content = bytearray(getattr(SIGNED, where))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    changed = pb.SignedStatement(statement=SIGNED.statement, signature=SIGNED.signature)
    setattr(changed, where, bytes(content))
    with pytest.raises(WireError, match="'c' refused: a signature that is not its node key's"):
        verify(changed, public(STRANGER), "c")


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_bytes_that_are_no_signature_are_refused(statement: bytes, signature: bytes) -> None:
    with pytest.raises(WireError):
        verify(pb.SignedStatement(statement=statement, signature=signature), public(STRANGER), "c")


def test_another_key_and_no_key_are_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(WireError, match="not its node key's"):
        verify(SIGNED, public(other), "c")
    with pytest.raises(WireError, match="a signature of 64 bytes, its key makes 96"):
        verify(SIGNED, public(ec.generate_private_key(ec.SECP384R1())), "c")
    with pytest.raises(WireError, match="not an elliptic-curve key"):
        verify(SIGNED, b"cam-7", "c")


def test_what_the_key_signs_elsewhere_is_no_statement() -> None:
    """Flower has the node key sign what a server may choose in part: without our prefix it must not count."""
    r, s = decode_dss_signature(STRANGER.sign(SIGNED.statement, ec.ECDSA(SHA256())))
    bare = pb.SignedStatement(
        statement=SIGNED.statement, signature=r.to_bytes(32, "big") + s.to_bytes(32, "big")
    )
    with pytest.raises(WireError, match="not its node key's"):
        verify(bare, public(STRANGER), "c")


def test_every_field_of_a_statement_counts() -> None:
    for descriptor in pb.UpdateStatement.DESCRIPTOR.fields:
        other = pb.UpdateStatement()
        other.CopyFrom(STATEMENT)
        value = getattr(other, descriptor.name)
        changed = value + 1 if isinstance(value, int) else value + (b"x" if isinstance(value, bytes) else "x")
        setattr(other, descriptor.name, changed)
        assert mismatch(other, STATEMENT).startswith("its signature is for ")
    assert mismatch(STATEMENT, STATEMENT) == ""


# --- a client, or somebody between it and its edge ----------------------------------------------------------


@dataclass
class Reply:
    """A client's reply on its way to the edge, and what came of the first round."""

    content: RecordDict
    report: pb.ClientReport
    key: ec.EllipticCurvePrivateKey
    first: Reply | None

    def signed_as(self, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> None:
        statement = pb.UpdateStatement.FromString(self.report.signed.statement)
        for name, value in changes.items():
            setattr(statement, name, value)
        self.report.signed.CopyFrom(sign(statement, key or self.key))


def replay(reply: Reply) -> None:
    assert reply.first is not None
    reply.content, reply.report = reply.first.content, reply.first.report


def replay_the_signature(reply: Reply) -> None:
    assert reply.first is not None
    reply.report.signed.CopyFrom(reply.first.report.signed)


def change_a_weight(reply: Reply) -> None:
    record = reply.content[control.ARRAYS]
    assert isinstance(record, ArrayRecord)
    [(dtype, array)] = record.items()
    data = bytearray(array.data)
    data[-2] ^= 1
    changed = Array(array.dtype, array.shape, array.stype, bytes(data))
    reply.content[control.ARRAYS] = ArrayRecord({dtype: changed})


def rename_a_record(reply: Reply) -> None:
    reply.content["head"] = reply.content[control.ARRAYS]
    del reply.content[control.ARRAYS]


def add_a_record(reply: Reply) -> None:
    reply.content["head"] = reply.content[control.ARRAYS]


def report_fewer_samples(reply: Reply) -> None:
    reply.report.samples -= 1


def report_another_loss(reply: Reply) -> None:
    reply.report.loss += 0.5


def report_another_metric(reply: Reply) -> None:
    reply.report.metrics["lr-sum"] += 1


def describe_a_layout(reply: Reply) -> None:
    reply.report.sections.add(name="model").layout.tensors.add(name="w", dtype="float32", shape=[1])


def take_the_signature_off(reply: Reply) -> None:
    reply.report.ClearField("signed")


CLIENT_ATTACKS: list[tuple[Callable[[Reply], None], str]] = [
    (lambda reply: None, ""),
    (replay, "a reply to run 'r' window 1, this is run 'r' window 2"),
    (replay_the_signature, "its signature is for window 1, this is window 3"),
    (change_a_weight, "its signature is for another payload than the one received"),
    (rename_a_record, "its signature is for another payload than the one received"),
    (add_a_record, "its signature is for another payload than the one received"),
    (report_fewer_samples, "its signature is for samples 48, this is samples 47"),
    (report_another_loss, "its signature is for another report than the one received"),
    (report_another_metric, "its signature is for another report than the one received"),
    (describe_a_layout, "its signature is for another layout of the payload"),
    (take_the_signature_off, "an update without a signature.*SuperNode.*require-signatures=false"),
    (lambda reply: reply.signed_as(STRANGER), "a signature that is not its node key's"),
    (lambda reply: reply.signed_as(edge="edge-2"), "for edge 'edge-2', this is edge 'edge-1'"),
    (lambda reply: reply.signed_as(client="c1"), "for client 'c1', this is client 'c0'"),
    (lambda reply: reply.signed_as(inquiry="loss"), "for inquiry 'loss', this is inquiry ''"),
    (lambda reply: reply.signed_as(nonce=b"of before a crash"), "for another plan than this one"),
    (lambda reply: reply.signed_as(architecture=b"x"), "for another architecture than the one sent"),
]


def between(tree: LocalTree, client: str, attacks: list[Callable[[Reply], None]]) -> None:
    """Sit between a client and its edge: the n-th attack goes on in round n."""
    [node] = [n for below in tree.edges for n in below if n.config["name"] == client]
    app, key = node.app, load_key(Path(node.config["key"]))
    first: list[Reply] = []

    def answer(message: Message, context: Any) -> Message:
        sent = app(message, context)
        if message.metadata.message_type != control.TRAIN:
            return sent
        report = control.read_control(pb.ClientReport, sent, client)
        reply = Reply(RecordDict(dict(sent.content.items())), report, key, first[0] if first else None)
        attacks[len(first)](reply)
        first.append(reply)
        reply.content[control.REPORT] = ConfigRecord({control.PLAN: reply.report.SerializeToString()})
        return Message(reply.content, reply_to=message)

    node.app = answer


@pytest.fixture
def tree(tmp_path: Path) -> LocalTree:
    """Two edges with two clients each, of 48 images."""
    return small_tree(tmp_path, clients=4, of=30, reach=lambda i: (i // 2,))


def faults_by_window(run: TreeRun) -> dict[int, list[tuple[str, str, str, str]]]:
    found: dict[int, list[tuple[str, str, str, str]]] = {}
    for fault in run.recorder.record.faults:
        found.setdefault(fault.window, []).append((fault.tier, fault.node, fault.kind, fault.detail))
    return found


def test_an_invalid_client_signature_is_refused(tree: LocalTree) -> None:
    between(tree, "c0", [attack for attack, _ in CLIENT_ATTACKS])
    run = run_tree(tree, "fedavg", 4, rounds=len(CLIENT_ATTACKS))
    faults = faults_by_window(run)
    for window, (_, words) in enumerate(CLIENT_ATTACKS, start=1):
        if words:
            [(tier, node, kind, detail)] = faults[window]
            assert (tier, node, kind) == ("edge", "c0", "refused")
            assert re.search(words, detail), detail
        entry = run.recorder.record.windows[window - 1]
        expected = ["c1", "c2", "c3"] if words else ["c0", "c1", "c2", "c3"]
        assert sorted(p.client for p in entry.rounds[0].participants if p.signed) == expected
        assert (entry.signatures.edges, entry.signatures.cloud) == (len(expected), len(expected))
    assert 1 not in faults


def test_unsigned_updates_are_listed_where_allowed(tree: LocalTree) -> None:
    between(tree, "c0", [take_the_signature_off, change_a_weight])
    run = run_tree(tree, "fedavg", 4, rounds=2, require_signatures=False)
    one, two = run.recorder.record.windows
    assert {p.client: p.signed for p in one.rounds[0].participants} == {
        "c0": False,
        "c1": True,
        "c2": True,
        "c3": True,
    }
    assert (one.signatures.edges, one.signatures.cloud, one.signatures.unsigned) == (3, 3, ["c0"])
    # What is signed must fit all the same.
    assert two.participants == ["c1", "c2", "c3"]
    assert (two.signatures.cloud, two.signatures.unsigned) == (3, [])


def test_answers_to_inquiries_are_signed_too(tree: LocalTree) -> None:
    """Power-of-Choice asks for losses at the cloud in a window's first round, and at the edges in its second."""
    run = run_tree(tree, "fedavg", 4, rounds=2, rg=2, selection="pow-d", fraction=0.5, candidates=4)
    [window] = run.recorder.record.windows
    trained = sum(len(r.participants) for r in window.rounds)
    assert window.signatures.cloud == 4 + trained
    assert window.signatures.edges == 4 + trained + 4
    assert not run.recorder.record.faults


# --- an edge ------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """An edge's report on its way to the cloud, and that of the first window."""

    report: pb.EdgeReport
    first: pb.EdgeReport | None = None
    entry: pb.ClientReport = field(init=False)

    def __post_init__(self) -> None:
        [self.entry] = [c for c in self.report.rounds[0].clients if c.client == "c2"]


def invent_a_client(told: Told) -> None:
    ghost = told.report.rounds[0].clients.add()
    ghost.CopyFrom(told.entry)
    ghost.client = "ghost"


def claim_a_client_of_another_edge(told: Told) -> None:
    told.entry.client = "c0"


def count_a_client_twice(told: Told) -> None:
    told.report.rounds[0].clients.add().CopyFrom(told.entry)
    told.report.samples += told.entry.samples


def speak_for_a_client_that_is_away(told: Told) -> None:
    """Claim that c2 answered this window with what it sent in the first one."""
    assert told.first is not None
    [old] = [c for c in told.first.rounds[0].clients if c.client == "c2"]
    told.entry.CopyFrom(old)


def sign_in_its_name(told: Told) -> None:
    statement = pb.UpdateStatement.FromString(told.entry.signed.statement)
    told.entry.signed.CopyFrom(sign(statement, STRANGER))


def raise_its_samples(told: Told) -> None:
    told.entry.samples += 1000
    told.report.samples += 1000


def raise_the_sum(told: Told) -> None:
    told.report.samples += 1000


def lower_its_loss(told: Told) -> None:
    told.entry.loss = 0.0


def strip_a_signature(told: Told) -> None:
    told.entry.ClearField("signed")


EDGE_ATTACKS: list[tuple[Callable[[Told], None], str]] = [
    (lambda told: None, ""),
    (invent_a_client, "an update of 'ghost' in round 2, which was not planned there"),
    (claim_a_client_of_another_edge, "an update of 'c0' in round 3, which was not planned there"),
    (count_a_client_twice, "an update of 'c2' in round 4 a second time"),
    (speak_for_a_client_that_is_away, "an update of 'c2': its signature is for window 1, this is window 5"),
    (sign_in_its_name, "an update of 'c2' with a signature that is not its node key's"),
    (raise_its_samples, "an update of 'c2': its signature is for samples 48, this is samples 1048"),
    (raise_the_sum, "1096 samples, but its clients' updates have 96"),
    (lower_its_loss, "an update of 'c2': its signature is for another report"),
    (strip_a_signature, "an update of 'c2' in round 10 that c2 did not sign"),
]


def test_a_forged_edge_report_is_refused(tree: LocalTree) -> None:
    app = tree.nodes[1].app
    first: list[pb.EdgeReport] = []

    def answer(message: Message, context: Any) -> Message:
        reply: Message = app(message, context)
        if message.metadata.message_type == control.TRAIN:
            report = control.read_control(pb.EdgeReport, reply, "edge-2")
            kept = pb.EdgeReport()
            kept.CopyFrom(report)
            EDGE_ATTACKS[len(first)][0](Told(report, first[0] if first else None))
            first.append(kept)
            reply.content[control.REPORT] = ConfigRecord({control.PLAN: report.SerializeToString()})
        return reply

    tree.nodes[1].app = answer
    run = run_tree(tree, "fedavg", 4, rounds=len(EDGE_ATTACKS))
    faults = faults_by_window(run)
    for window, (_, words) in enumerate(EDGE_ATTACKS, start=1):
        entry = run.recorder.record.windows[window - 1]
        if words:
            [(tier, node, kind, detail)] = faults[window]
            assert (tier, node, kind) == ("cloud", "edge-2", "refused")
            assert words in detail
        assert sorted(entry.rho) == (["edge-1"] if words else ["edge-1", "edge-2"])
        assert entry.participants == (["c0", "c1"] if words else ["c0", "c1", "c2", "c3"])
    assert 1 not in faults


# --- the cloud's keys ---------------------------------------------------------------------------------------


def test_the_first_key_of_a_client_stays_bound_to_it(tmp_path: Path) -> None:
    keys = ClientKeys(tmp_path)
    keys.claim("c", public(STRANGER))
    other = public(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(WireError, match="another node key owns this name"):
        ClientKeys(tmp_path).claim("c", other)
    with pytest.raises(WireError, match="did not report its node key"):
        keys.claim("d", b"")
    assert ClientKeys(tmp_path).in_force() == {"c": public(STRANGER)}


def test_a_cloud_that_enforces_keys_trusts_no_first_one(tmp_path: Path) -> None:
    ClientKeys(tmp_path).claim("c", public(STRANGER))  # seen when keys were not enforced
    keys = ClientKeys(tmp_path, keys_only=True)
    assert keys.in_force() == {}
    with pytest.raises(
        WireError, match="'c' refused: no client's key is registered at the cloud; there: espalier"
    ):
        keys.claim("c", public(STRANGER))
    KeyRegistry(tmp_path / CLIENT_KEYS).add("c", public(STRANGER))
    keys.claim("c", public(STRANGER))
    assert set(keys.in_force()) == {"c"}


def test_a_registry_goes_before_what_was_seen(tmp_path: Path) -> None:
    keys = ClientKeys(tmp_path)
    keys.claim("seen", public(STRANGER))
    mine = public(ec.generate_private_key(ec.SECP256R1()))
    registry = KeyRegistry(tmp_path / CLIENT_KEYS)
    registry.add("c", mine)
    assert keys.in_force() == {"c": mine}
    with pytest.raises(WireError, match="not registered"):
        keys.claim("seen", public(STRANGER))
    registry.revoke("c")
    assert keys.in_force() == {}
    with pytest.raises(WireError, match="was revoked"):
        keys.claim("c", mine)


def test_only_registered_clients_take_part(tree: LocalTree, tmp_path: Path) -> None:
    """c0, c1 and c2 are registered, c3 is not; c1 is revoked later, which the next run sees."""
    registry = KeyRegistry(tmp_path / "cloud" / CLIENT_KEYS)
    for node in [n for below in tree.edges for n in below][:3]:
        registry.add(str(node.config["name"]), node.key)
    run = run_tree(tree, "fedavg", 3, rounds=1)
    assert run.recorder.record.windows[0].participants == ["c0", "c1", "c2"]
    [fault] = run.recorder.record.faults
    assert (fault.node, fault.kind) == ("c3", "refused")
    assert "not registered" in fault.detail
    registry.revoke("c1")
    again = tree.run("again", {"method": "fedavg", "model": "mlp", "rounds": 1, "min-clients": 2})
    assert again.recorder.record.windows[0].participants == ["c0", "c2"]


def test_a_client_revoked_during_a_window_is_refused() -> None:
    plan = pb.WindowPlan(run="r", window=2)
    plan.rounds.add(round=3).participants.add(client="c", edge="e")
    report = pb.EdgeReport(edge="e", samples=30)
    report.rounds.add(round=3).clients.add(client="c", samples=30, signed=SIGNED)
    with pytest.raises(WireError, match="'e' refused: an update of 'c' in round 3, whose key is unknown or"):
        check_contributions(plan, report, lambda name: None, required=False)
