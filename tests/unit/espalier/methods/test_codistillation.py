"""Co-distillation: the term against the peers' predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from espalier.errors import WireError
from espalier.methods.codistillation import PeerDistillation, peer_section
from espalier.models.architecture import describe
from espalier.models.arrays import model_arrays
from espalier.tasks.classification import CrossEntropy
from espalier_client.trainer import train_local
from tests.support.terms import Images, added_loss, batch, local_round, network, received, result


def test_the_peers_term_by_its_formula() -> None:
    model, peers = network("cnn"), [network("mlp", seed=2), network("cnn-bn", seed=3)]
    term = PeerDistillation(0.5, burn_in=1, peers=lambda _: peers)
    term.begin(model, local_round(model, round_=2))
    images, _ = batch()
    with torch.no_grad():
        teacher = torch.stack([peer.eval()(images).softmax(1) for peer in peers]).mean(0)
        by_hand = -(teacher * model(images).log_softmax(1)).sum(1).mean().item()
    assert added_loss(term, model) == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_peers_are_never_changed_and_get_no_gradient() -> None:
    model, peer = network("cnn"), network("cnn-bn", seed=3)
    before = received(peer)
    objective = CrossEntropy() + PeerDistillation(1.0, peers=lambda _: [peer])
    local = local_round(model)
    train_local(model, objective, Images(12), local, seed=1, device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in peer.state_dict().items())
    assert all(p.grad is None for p in peer.parameters())


def test_no_term_during_the_burn_in_or_without_peers() -> None:
    model = network("cnn")
    for term in (PeerDistillation(1.0, burn_in=2, peers=lambda _: [network("mlp")]), PeerDistillation(1.0)):
        term.begin(model, local_round(model, round_=2))
        assert added_loss(term, model) == 0.0
        assert term.end(model, result(), {}) == {}


def test_received_peers_are_the_others_networks() -> None:
    model, peer = network("cnn"), network("mlp", seed=2)
    arrays = model_arrays(peer)
    known: dict[str, Any] = {
        "sections": {peer_section("b"): arrays},
        "peers": {"client": describe(model), "b": describe(peer)},
    }
    term, same = PeerDistillation(1.0), PeerDistillation(1.0, peers=lambda _: [peer])
    term.begin(model, local_round(model, **known))
    found = added_loss(term, model)
    term.end(model, result(), {})
    same.begin(model, local_round(model))
    assert found == pytest.approx(added_loss(same, model))
    assert found > math.log(10) / 2
    del arrays["classifier.bias"]
    with pytest.raises(WireError, match="b's network cannot be built"):
        term.begin(model, local_round(model, **known))
