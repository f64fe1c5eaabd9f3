"""FedProx, SCAFFOLD and FedDyn at the client."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.methods.feddyn import DynamicRegularizer
from espalier.methods.fedprox import ProximalTerm
from espalier.methods.scaffold import ControlVariates
from espalier.training.objectives import LocalRound, Objective
from espalier.training.trainer import train_local
from tests.support.terms import Images, gradients, local_round, moved, network, received, result

NOTHING = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), Generator()


def test_the_gradient_of_the_proximal_term_is_mu_times_the_difference() -> None:
    model = network("cnn-bn")
    local = local_round(model)
    term = ProximalTerm(0.3)
    term.begin(moved(model), local)
    found = gradients(term, model)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], 0.3 * (parameter - local.received[name]), atol=1e-7)
    # The norm is squared, so twice the distance has twice the gradient; un-squared it would not change.
    near = torch.cat([g.flatten() for g in found.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(local.received[name] + 2 * (parameter - local.received[name]))
    far = torch.cat([g.flatten() for g in gradients(term, model).values()]).norm()
    assert (far / near).item() == pytest.approx(2.0, rel=1e-5)


def test_the_proximal_term_is_of_parameters_not_of_running_statistics() -> None:
    model = network("cnn-bn")
    local = local_round(model)
    term = ProximalTerm(2.0)
    term.begin(model, local)
    model.get_buffer("norm1.running_mean").fill_(7.0)
    assert term.loss(model, *NOTHING).item() == 0.0
    with torch.no_grad():
        model.get_parameter("norm1.weight")[0] += 3.0
    assert term.loss(model, *NOTHING).item() == pytest.approx(2.0 / 2 * 9)


class Quadratic(Objective):
    """Half the squared distance of a vector to a client's own optimum, the same on every batch."""

    def __init__(self, optimum: list[float]) -> None:
        self.optimum = torch.tensor(optimum)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return (model.get_parameter("theta") - self.optimum).square().sum() / 2


class Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))
        self.register_buffer("counter", torch.tensor(1.0))


def train(model: nn.Module, objective: Objective, local: LocalRound) -> dict[str, float]:
    """Train on eight images in one batch, and end with exactly what was trained."""
    outcome = train_local(model, objective, Images(8), local, seed=1, device="cpu")
    return objective.end(model, outcome, received(model))


def test_one_step_of_scaffold_and_its_control_variate() -> None:
    """By hand: w = (5, 1), gradient (4, -1), c = (1, 2), c_k = (0.5, -1), eta = 0.1."""
    model, state = Vector(5.0, 1.0), {"scaffold/theta": np.array([0.5, -1.0], np.float32)}
    local = local_round(model, local_steps=1, state=state)
    local.aux = {"control/theta": np.array([1.0, 2.0], np.float32)}
    metrics = train(model, Quadratic([1.0, 2.0]) + ControlVariates(), local)
    # y = w - 0.1 (g - c_k + c) = (5, 1) - 0.1 (4.5, 2)
    assert model.theta.tolist() == pytest.approx([4.55, 0.8])
    # c_k+ = c_k - c + (w - y) / 0.1: after one step that is the gradient at w.
    assert state["scaffold/theta"].tolist() == pytest.approx([4.0, -1.0], abs=1e-5)
    assert metrics == {"lr-sum": pytest.approx(0.1)}
    assert set(state) == {"scaffold/theta"}


def test_scaffolds_variate_is_the_mean_gradient_of_all_its_steps() -> None:
    model, state = Vector(5.0), dict[str, np.ndarray]()
    local = local_round(model, local_epochs=3, learning_rate=0.5, state=state)
    metrics = train(model, Quadratic([1.0]) + ControlVariates(), local)
    # Without variates yet: theta - 1 is 4, 2, 1 at the three steps.
    assert state["scaffold/theta"].tolist() == pytest.approx([7 / 3])
    assert metrics["lr-sum"] == pytest.approx(1.5)


def test_scaffold_computes_from_what_the_server_reads() -> None:
    """A codec that rounded y to (4, 1): client and server, who rebuilds the change, must agree."""
    model, state = Vector(5.0, 1.0), {"scaffold/theta": np.array([0.5, -1.0], np.float32)}
    local = local_round(model, state=state)
    local.aux = {"control/theta": np.array([1.0, 2.0], np.float32)}
    term = ControlVariates()
    term.begin(model, local)
    term.end(model, result(lr_sum=0.2), {"theta": torch.tensor([4.0, 1.0]), "counter": torch.tensor(9.0)})
    change = -np.array([1.0, 2.0]) + (np.array([5.0, 1.0]) - np.array([4.0, 1.0])) / 0.2
    assert state["scaffold/theta"].tolist() == pytest.approx((np.array([0.5, -1.0]) + change).tolist())


def test_the_mean_of_the_variates_stays_the_servers_with_sampled_clients() -> None:
    """C == mean c_k over rounds in which 2 of 3 clients take part (heterogeneity.md section 10.5)."""
    optima = [[0.0, 3.0], [4.0, -1.0], [1.0, 1.0]]
    states: list[dict[str, np.ndarray]] = [{}, {}, {}]
    weights, common = np.array([2.0, 2.0], np.float32), np.zeros(2, np.float32)
    for number, picked in enumerate([(0, 1), (1, 2), (0, 2), (0, 1)], 1):
        moves, changes = [], []
        for k in picked:
            model = Vector(*weights.tolist())
            local = local_round(model, local_steps=k + 1, state=states[k], round_=number)
            local.aux = {"control/theta": common}
            metrics = train(model, Quadratic(optima[k]) + ControlVariates(), local)
            move = model.theta.detach().numpy() - weights
            moves.append(move)
            changes.append(-common - move / metrics["lr-sum"])
        weights = weights + np.mean(moves, 0).astype(np.float32)
        common = common + (np.sum(changes, 0) / 3).astype(np.float32)
        own = [s.get("scaffold/theta", np.zeros(2, np.float32)) for s in states]
        assert common == pytest.approx(np.mean(own, 0), abs=1e-5)


def test_one_step_of_scaffold_with_everyone_is_a_step_of_sgd() -> None:
    """With K = 1 and full participation the corrections cancel in the mean (section 10.5)."""
    optima, states = [[0.0, 3.0], [4.0, -1.0]], [dict[str, np.ndarray](), dict[str, np.ndarray]()]
    weights, common = np.array([2.0, 2.0]), np.zeros(2, np.float32)
    for number in (1, 2, 3):
        gradient = weights - np.mean(optima, 0)
        trained, changes = [], []
        for optimum, state in zip(optima, states, strict=True):
            model = Vector(*weights.tolist())
            local = local_round(model, local_steps=1, state=state, round_=number)
            local.aux = {"control/theta": common}
            train(model, Quadratic(optimum) + ControlVariates(), local)
            trained.append(model.theta.detach().numpy())
            changes.append(-common + (weights - trained[-1]) / 0.1)
        assert np.mean(trained, 0) == pytest.approx(weights - 0.1 * gradient, abs=1e-5)
        weights, common = np.mean(trained, 0), (common + np.mean(changes, 0)).astype(np.float32)


def test_the_dynamic_regulariser_and_its_recursion() -> None:
    """By hand: w = (5, 1), g_k = (2, -1), alpha = 0.5; at theta = (6, 3)."""
    model, state = Vector(5.0, 1.0), {"dyn/theta": np.array([2.0, -1.0], np.float32)}
    before = dict(state)
    term = DynamicRegularizer(0.5)
    term.begin(model, local_round(model, state=state))
    with torch.no_grad():
        model.theta.copy_(torch.tensor([6.0, 3.0]))
    # -<(6, 3), (2, -1)> + 0.25 * (1 + 4)
    assert term.loss(model, *NOTHING).item() == pytest.approx(-9 + 1.25)
    # -g_k + alpha (theta - w)
    assert gradients(term, model)["theta"].tolist() == pytest.approx([-2 + 0.5, 1 + 1.0])
    # The server reads (7, 3): g_k - 0.5 (2, 2)
    term.end(model, result(), {"theta": torch.tensor([7.0, 3.0]), "counter": torch.tensor(4.0)})
    assert state["dyn/theta"].tolist() == pytest.approx([1.0, -2.0])
    assert before["dyn/theta"].tolist() == [2.0, -1.0], "a former state was written to"
    assert set(state) == {"dyn/theta"}


def test_feddyns_fixed_point_is_the_optimum_of_the_sum() -> None:
    """Two clients of unlike optima; the server's rule by the paper, h as the mean of all g_k."""
    optima, states = [[0.0], [4.0]], [dict[str, np.ndarray](), dict[str, np.ndarray]()]
    alpha, weights, h = 0.5, 9.0, 0.0
    for number in range(1, 31):
        trained = []
        for optimum, state in zip(optima, states, strict=True):
            model = Vector(weights)
            local = local_round(model, local_epochs=30, learning_rate=0.4, state=state, round_=number)
            train(model, Quadratic(optimum) + DynamicRegularizer(alpha), local)
            trained.append(model.theta.item())
        h -= alpha / 2 * sum(theta - weights for theta in trained)
        assert h == pytest.approx(np.mean([s["dyn/theta"][0] for s in states]), abs=1e-4)
        weights = float(np.mean(trained)) - h / alpha
    assert weights == pytest.approx(2.0, abs=1e-3)
    # At the optimum g_k is the gradient of the client's own loss: 2 - 0 and 2 - 4.
    assert [s["dyn/theta"][0] for s in states] == pytest.approx([2.0, -2.0], abs=1e-3)


@pytest.mark.parametrize(
    ("term", "prefix"), [(DynamicRegularizer(0.5), "dyn/"), (ControlVariates(), "scaffold/")]
)
def test_a_sub_network_uses_the_leading_block_and_leaves_the_rest(term: Objective, prefix: str) -> None:
    """The level changes from round to round: kept 3 long, trained 2 long, then 4 long."""
    state = {prefix + "theta": np.array([1.0, 2.0, 3.0], np.float32)}
    small = Vector(0.0, 0.0)
    term.begin(small, local_round(small, state=state))
    term.end(small, result(lr_sum=1.0), {"theta": torch.tensor([2.0, 0.0]), "counter": torch.tensor(0.0)})
    # w - y = (-2, 0): FedDyn adds -alpha (y - w), SCAFFOLD adds (w - y) / (K eta), c being 0.
    moved_by = -1.0 if prefix == "dyn/" else -2.0
    assert state[prefix + "theta"].tolist() == [1.0 + moved_by, 2.0, 3.0]
    large = Vector(0.0, 0.0, 0.0, 0.0)
    term.begin(large, local_round(large, state=state))
    term.end(large, result(), received(large))
    assert state[prefix + "theta"].tolist() == [1.0 + moved_by, 2.0, 3.0, 0.0]


def test_control_variates_and_regularisers_hold_parameters_only() -> None:
    for term in (DynamicRegularizer(0.1), ControlVariates()):
        model = network("cnn-bn")
        local = local_round(model)
        term.begin(model, local)
        term.end(model, result(), received(moved(model)))
        names = {key.partition("/")[2] for key in local.state}
        assert names == {name for name, _ in model.named_parameters()}


def test_training_a_network_leaves_the_correction_on_every_parameter() -> None:
    """A whole round of SCAFFOLD on a CNN against textbook steps computed apart."""
    model, common = network("cnn"), {}
    for name, parameter in model.named_parameters():
        common["control/" + name] = np.full(parameter.shape, 0.01, np.float32)
    local = local_round(model, local_steps=1, aux=common, batch_size=6)
    plain = network("cnn")
    images, labels = Images(6).images, torch.arange(6)
    torch.autograd.backward(nn.functional.cross_entropy(plain(images), labels))

    class Loss(Objective):
        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            return nn.functional.cross_entropy(model(images), labels)

    train_local(model, Loss() + ControlVariates(), Images(6), local, seed=1, device="cpu")
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs - 0.1 * (theirs.grad + 0.01), atol=1e-6), name
