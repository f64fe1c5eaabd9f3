"""FD, FedProto, co-distillation and FedKTL in whole trees, against computations of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.local_tree import LocalClient, LocalTree
from torch.nn import functional

from espalier.data.spec import open_data
from espalier.errors import ConfigError
from espalier.methods.aggregate import ROWS_SECTION
from espalier.methods.codistillation import COPY
from espalier.methods.fedktl import FedKTL
from espalier.methods.fedktl.client import ArcFace
from espalier.methods.fedktl.method import TRANSFORMER
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier.training.objectives import LocalRound
from espalier.wire.class_table import COUNT, MEAN, REPLY, ROUND, TABLE, VECTORS
from espalier.wire.pairs import CENTROIDS, IMAGES, PAIRS
from espalier.wire.sections import PEER
from tests.support.by_hand import Arrays, Call, kept, run_tree, small_tree, tapped
from tests.support.exchanges import (
    edges_tell,
    images_of,
    listen_to_starts,
    network,
    own_model,
    rows,
    training,
)
from tests.support.generators import random_gan

#: Two classes a client, so that of four clients' nobody holds all; all images are one batch.
DATA = "digits:{i}/{of}:pathological=2"
TINY: dict[str, Any] = {"families": "mlp,logistic", "batch_size": 256}


def knowledge_tree(folder: Path, clients: int = 4, edges: int = 2, **more: Any) -> LocalTree:
    return small_tree(folder, clients, 60, edges, data=DATA, **more)


def by_class(calls: dict[str, Call], label: int) -> list[np.ndarray]:
    return [rows(call)[label] for call in calls.values() if label in rows(call)]


def given(call: Call) -> Arrays:
    return {name: call.sent_sections[TABLE][name] for name in (MEAN, COUNT, ROUND)}


# --- class tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "families"), [("fd", "mlp,logistic"), ("fedproto", "cnn4,resnet4")])
def test_clients_receive_the_mean_of_the_tables(name: str, families: str, tmp_path: Path) -> None:
    tree = knowledge_tree(tmp_path)
    calls = tapped(tree)
    run = run_tree(tree, name, 4, **TINY | {"families": families}, rounds=3)
    assert run.state is not None
    tables = [given(training(calls, r)["c0"]) for r in (1, 2, 3)]
    tables.append({n: run.state.section(TABLE)[n] for n in (MEAN, COUNT, ROUND)})
    assert not tables[0][COUNT].any()
    for round_ in (1, 2, 3):
        replies, table = training(calls, round_), tables[round_]
        assert set(replies) == {"c0", "c1", "c2", "c3"}
        assert table[ROUND] == round_
        absent = 0
        for label in range(10):
            vectors = by_class(replies, label)
            assert table[COUNT][label] == len(vectors)
            expected = np.mean(vectors, axis=0) if vectors else np.zeros(table[MEAN].shape[1])
            np.testing.assert_allclose(table[MEAN][label], expected, rtol=0, atol=1e-6)
            absent += not vectors
        assert absent >= 2
        # All clients of a round are given the same.
        for call in training(calls, round_).values():
            np.testing.assert_array_equal(call.sent_sections[TABLE][MEAN], tables[round_ - 1][MEAN])


def test_fd_against_the_others_of_the_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss of a run with half of the clients a round: who sat out takes nothing out of the table."""
    starts, tree = listen_to_starts(monkeypatch), knowledge_tree(tmp_path, edges=1)
    calls = tapped(tree)
    run_tree(tree, "fd", 4, **TINY, rounds=8, fraction=0.5, seed=2)
    seen = {"took part": 0, "sat out": 0}
    for call in (c for c in calls if c.trains and c.plan.round > 1):
        name, former = call.plan.client, training(calls, call.plan.round - 1)
        state = starts[name, call.plan.start.round]
        if not state:  # its first round: nothing is kept to compute from
            continue
        images, labels = images_of(DATA.format(i=name[1:], of=60))
        with torch.no_grad():
            logs = own_model(call, state)(images).log_softmax(1)
        others = {n: c for n, c in former.items() if n != name}
        teacher = torch.zeros(10, 10)
        for label in range(10):
            if vectors := by_class(others, label):
                teacher[label] = torch.from_numpy(np.mean(vectors, axis=0))
        expected = -(teacher[labels] * logs).sum(1).mean().item()
        assert call.report.metrics["soft-label-loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        seen["took part" if name in former else "sat out"] += 1
        # What it sends: mean outputs by class of the batch it trained on.
        for label, vector in rows(call).items():
            mean = logs.exp()[labels == label].mean(0).numpy()
            np.testing.assert_allclose(vector, mean, rtol=0, atol=1e-6)
        assert set(rows(call)) == set(labels.tolist())
    assert seen["took part"] >= 3
    assert seen["sat out"] >= 3


def test_an_edge_uses_its_own_table_between_reports(tmp_path: Path) -> None:
    tree = knowledge_tree(tmp_path, reach=lambda i: (i % 2,))
    calls = tapped(tree)
    run = run_tree(tree, "fd", 4, **TINY, rounds=2, rg=2)
    first, second = training(calls, 1), training(calls, 2)
    for name, call in second.items():
        same_edge = {n: c for n, c in first.items() if c.plan.edge == call.plan.edge}
        assert name in same_edge
        assert len(same_edge) == 2
        for label in range(10):
            vectors = by_class(same_edge, label)
            assert call.sent_sections[TABLE][COUNT][label] == len(vectors)
            if vectors:
                np.testing.assert_allclose(
                    call.sent_sections[TABLE][MEAN][label], np.mean(vectors, axis=0), atol=1e-6
                )
    assert run.state is not None
    # Both rounds' counts added up would be twice as many contributions as there are clients.
    counts = [len(by_class(second, label)) for label in range(10)]
    np.testing.assert_array_equal(run.state.section(TABLE)[COUNT], counts)


def test_fedproto_averages_over_holders_of_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, tree = listen_to_starts(monkeypatch), knowledge_tree(tmp_path, 2, 1)
    calls = tapped(tree)
    run_tree(tree, "fedproto", 2, **TINY | {"families": "cnn4,resnet4"}, rounds=2)
    for name, call in training(calls, 2).items():
        images, labels = images_of(DATA.format(i=name[1:], of=60))
        model = own_model(call, starts[name, 1]).train()
        with torch.no_grad():
            features = model.features(images)
        squares = (features - torch.from_numpy(call.sent_sections[TABLE][MEAN])[labels]).square().mean(1)
        # All its classes are held, by itself at least.
        assert (call.sent_sections[TABLE][COUNT][labels] >= 1).all()
        assert call.report.metrics["prototype-loss"] == pytest.approx(squares.mean().item(), rel=1e-4)
        # What it sends: mean features by class of the network as it is after training.
        trained = own_model(call, kept(tmp_path, name)).eval()
        with torch.no_grad():
            after = trained.features(images)
        for label, vector in rows(call).items():
            np.testing.assert_allclose(vector, after[labels == label].mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_fedproto_refuses_features_of_unlike_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fedproto needs features of one length.*cnn4 512, mlp 30"):
        run_tree(knowledge_tree(tmp_path, 2, 1), "fedproto", 2, families="cnn4,mlp", rounds=1)


def test_a_client_keeps_the_model_its_owner_chose(tmp_path: Path) -> None:
    """By `--model`; one whose features do not fit FedProto's is refused by name, and the others go on."""
    more: list[dict[str, Any] | None] = [{"model": "resnet4"}, None, {"model": "mlp"}]
    tree = LocalTree(
        tmp_path, [LocalClient(f"c{i}", f"digits:{i}/60", (0,), own) for i, own in enumerate(more)], 1
    )
    run = run_tree(tree, "fedproto", 3, families="cnn4", rounds=2, batch_size=64)
    faults = {(f.node, f.kind) for f in run.recorder.record.faults}
    assert {node for node, _ in faults} == {"c2"}
    detail = run.recorder.record.faults[0].detail
    assert "a table of 10 vectors of length 30, at most 10 of length 512 are expected" in detail
    assert run.recorder.record.windows[-1].assignments == {"c0": "resnet4", "c1": "cnn4", "c2": "mlp"}
    assert [w.participants for w in run.recorder.record.windows] == [["c0", "c1"], ["c0", "c1"]]


# --- co-distillation ---------------------------------------------------------------------------------


def copies(calls: list[Call], round_: int) -> dict[str, Arrays]:
    return {name: call.sections.get(COPY, {}) for name, call in training(calls, round_).items()}


def peers_sent(call: Call) -> dict[str, Arrays]:
    assert {section.name for section in call.sent_sections} <= {PEER}
    return {section.member: arrays for section, arrays in call.sent_sections.items()}


def test_peers_are_the_others_copies_of_the_last_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, tree = listen_to_starts(monkeypatch), knowledge_tree(tmp_path, 3)
    calls = tapped(tree)
    run_tree(tree, "codistillation", 3, **TINY, rounds=5, peer_every=2, peer_burn_in=3, peer_weight=0.5)
    made = {round_: copies(calls, round_) for round_ in range(1, 6)}
    assert all(not any(made[r].values()) for r in (1, 3, 5))
    for round_, exchange in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4)):
        for name, call in training(calls, round_).items():
            others = {n: arrays for n, arrays in made[exchange].items() if n != name} if exchange else {}
            sent = peers_sent(call)
            assert set(sent) == set(others) == set(call.plan.peers)
            for other, arrays in others.items():
                assert set(sent[other]) == set(arrays)
                for tensor, array in arrays.items():
                    np.testing.assert_array_equal(sent[other][tensor], array)
            # A copy is the network that its owner keeps.
            if exchange and exchange == round_ - 1:
                for tensor, array in made[exchange][name].items():
                    np.testing.assert_array_equal(starts[name, exchange]["own/" + tensor], array)
            if round_ <= 3:  # burn-in
                assert "peer-loss" not in call.report.metrics
                continue
            images, _ = images_of(DATA.format(i=name[1:], of=60))
            plans = {n: c.plan for n, c in training(calls, exchange).items()}
            with torch.no_grad():
                answers = [network(plans[n], a)(images).softmax(1) for n, a in others.items()]
                mine = own_model(call, starts[name, round_ - 1])(images)
            expected = functional.cross_entropy(mine, sum(answers) / len(answers)).item()
            assert call.report.metrics["peer-loss"] == pytest.approx(expected, rel=1e-4)


def test_an_edge_keeps_its_clients_copies_between_reports(tmp_path: Path) -> None:
    tree = knowledge_tree(tmp_path, reach=lambda i: (i % 2,))
    calls = tapped(tree)
    run = run_tree(tree, "codistillation", 4, **TINY, rounds=3, rg=2)
    # The record names the models alone, not whose copy each client needs not.
    assert set(run.recorder.record.windows[0].assignments.values()) == {"mlp", "logistic"}
    assert {n: set(peers_sent(c)) for n, c in training(calls, 2).items()} == {
        "c0": {"c2"},
        "c1": {"c3"},
        "c2": {"c0"},
        "c3": {"c1"},
    }
    # With the next window the cloud hands out everybody's.
    assert {n: len(peers_sent(c)) for n, c in training(calls, 3).items()} == dict.fromkeys(
        ("c0", "c1", "c2", "c3"), 3
    )


# --- FedKTL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_gan(tmp_path_factory.mktemp("generators") / "gan")


def test_fedktls_edges_stack_rows_without_names(tmp_path: Path, gan: str) -> None:
    tree = knowledge_tree(tmp_path)
    calls, told = tapped(tree), edges_tell(tree)
    run = run_tree(tree, "fedktl", 4, **TINY, rounds=2, generator=gan, alignment_epochs=3)
    assert run.state is not None
    for window in (1, 2):
        replies = training(calls, window)
        parts = [t for t in told if t.report.window == window]
        assert len(parts) == 2
        for part in parts:
            mine = [c for c in replies.values() if c.plan.edge == part.report.edge]
            assert mine
            stacked_rows = part.payload[ROWS_SECTION]
            assert {s: set(arrays) for s, arrays in part.payload.items()} == {
                ROWS_SECTION: {"labels", "vectors"}
            }
            expected = sorted((label, *vector.tolist()) for c in mine for label, vector in rows(c).items())
            stacked = zip(stacked_rows["labels"], stacked_rows["vectors"], strict=True)
            assert [(int(label), *vector.tolist()) for label, vector in stacked] == expected
            # Neither tensors nor their names say whose a row is, and the report names no client's classes.
            assert not any(name.encode() in part.raw for name in replies)
            assert all(not brief.HasField("table") for r in part.report.rounds for brief in r.clients)
        held = {label for call in replies.values() for label in rows(call)}
        pairs = training(calls, 2)["c0"].sent_sections[PAIRS] if window == 1 else run.state.section(PAIRS)
        assert pairs[IMAGES].shape == (len(held), 1, 8, 8)
        assert pairs[IMAGES].dtype == np.uint8
        assert pairs[CENTROIDS].shape == (len(held), 16)
        for vectors in (call.sections[REPLY][VECTORS] for call in replies.values()):
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert "transfer-loss" not in training(calls, 1)["c0"].report.metrics
    assert all(c.report.metrics["transfer-loss"] > 0 for c in training(calls, 2).values())
    notes = run.recorder.record.windows[-1].metrics
    assert {"alignment-mmd", "alignment-mse", "transfer-loss"} <= set(notes)


def test_fedktl_with_a_single_client(tmp_path: Path, gan: str) -> None:
    """Cloud–edge mode: no federation, but the generator's pairs all the same."""
    tree = small_tree(tmp_path, 1, 60, 1)
    calls = tapped(tree)
    run_tree(tree, "fedktl", 1, **TINY, rounds=2, generator=gan, alignment_epochs=3)
    [call] = training(calls, 2).values()
    assert len(call.sent_sections[PAIRS][IMAGES]) == len(rows(call)) >= 8
    assert call.report.metrics["transfer-loss"] > 0


@pytest.mark.parametrize(("clip_norm", "warned"), [(1.0, True), (100.0, False), (0.0, False)])
def test_fedktl_says_where_clipping_takes_its_gradient(
    clip_norm: float, warned: bool, gan: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = RunConfig.from_flat(
        {"method": "fedktl", "model": "mlp", "generator": gan, "clip-norm": clip_norm}
    )
    method = FedKTL(settings)
    method.set_data_shape((1, 8, 8), 10)
    with caplog.at_level("WARNING", "espalier.cloud"):
        method.before_run(method.initial_state(), lambda *_: pytest.fail("asked"))
    assert [("clip-norm=1" in r.getMessage()) for r in caplog.records] == [True] * warned


def test_arcfaces_gradient_is_too_long_for_the_default_clipping() -> None:
    settings = RunConfig.from_flat({"method": "fedktl", "model": "mlp", "generator": "gan:x"})
    data = open_data("digits")
    model = initial_model(settings, data.shape, 10)
    objective = ArcFace()
    objective.begin(model, LocalRound(settings, 1))
    labels = torch.from_numpy(np.asarray(data.labels)[:32])
    objective.loss(model, data.fetch(np.arange(32)), labels, torch.Generator()).backward()  # type: ignore[no-untyped-call]
    norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    assert norm > 10 * settings.clip_norm


@pytest.mark.parametrize("name", ["fd", "codistillation", "fedktl"])
def test_a_run_that_goes_on_from_its_checkpoint(name: str, tmp_path: Path, gan: str) -> None:
    """Servers' state (FedKTL's F as well) and clients' networks are those of a run in one go."""
    settings = TINY | ({"generator": gan, "alignment_epochs": 3} if name == "fedktl" else {})
    whole = run_tree(knowledge_tree(tmp_path / "a", 2, 1), name, 2, **settings, rounds=3)
    tree = knowledge_tree(tmp_path / "b", 2, 1)
    run_tree(tree, name, 2, **settings, rounds=2)
    again = run_tree(tree, name, 2, **settings, rounds=3)
    assert whole.state is not None
    assert again.state is not None
    assert again.state.round == 3
    expected, found = (
        {
            (s, n): a
            for part in (state.payload.views(), state.memory)
            for s, own in part.items()
            for n, a in own.items()
        }
        for state in (whole.state, again.state)
    )
    assert set(found) == set(expected)
    assert ((TRANSFORMER, "0.weight") in found) == (name == "fedktl")
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=str(key))
    for client in ("c0", "c1"):
        before, after = kept(tmp_path / "a", client), kept(tmp_path / "b", client)
        assert set(before) == set(after)
        for name_, array in before.items():
            np.testing.assert_array_equal(after[name_], array, err_msg=name_)
