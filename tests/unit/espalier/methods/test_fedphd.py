"""FedPhD: the group-norm penalty."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn

from espalier.methods.fedphd import GroupNormPenalty
from espalier.methods.run_config import RunConfig
from espalier.models.pruning import prune
from espalier.models.unet import unet
from espalier.training.objectives import LocalResult, LocalRound

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def result() -> LocalResult:
    return LocalResult(steps=1, samples=1, loss=0.0, lr_sum=0.0, seconds=0.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.GroupNorm(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
            self.linear.bias.fill_(100.0)
            self.norm.weight.copy_(torch.tensor([5.0, 12.0]))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a net of no registered family pass for one that is not pruned."""
    monkeypatch.setattr("espalier.methods.fedphd.models.is_reduced", lambda model: False)


@pytest.mark.usefixtures("whole")
def test_the_penalty_sums_the_norms_of_whole_weights() -> None:
    net, penalty = Net(), GroupNormPenalty(0.1)
    penalty.begin(net, LocalRound(RunConfig(), 1))
    value = penalty.loss(net, IMAGES, LABELS, seeded())
    # ||diag(3, 4)|| = 5 and ||(5, 12)|| = 13; biases do not count.
    assert value.item() == pytest.approx(0.1 * (5 + 13))
    torch.autograd.backward(value)
    assert net.linear.weight.grad is not None
    assert torch.allclose(net.linear.weight.grad, 0.1 * net.linear.weight / 5)
    assert net.linear.bias.grad is None
    assert penalty.end(net, result(), {}) == {"sparse-penalty": pytest.approx(1.8)}


@pytest.mark.usefixtures("whole")
def test_a_weight_that_is_all_zero_gets_a_finite_gradient() -> None:
    net, penalty = Net(), GroupNormPenalty(1.0)
    nn.init.zeros_(net.linear.weight)
    penalty.begin(net, LocalRound(RunConfig(), 1))
    torch.autograd.backward(penalty.loss(net, IMAGES, LABELS, seeded()))
    assert net.linear.weight.grad is not None
    assert torch.equal(net.linear.weight.grad, torch.zeros(2, 2))


@pytest.mark.usefixtures("whole")
def test_the_penalty_is_scaled_by_its_weight() -> None:
    net, penalty = Net(), GroupNormPenalty(0.5)
    penalty.begin(net, LocalRound(RunConfig(), 1))
    assert penalty.loss(net, IMAGES, LABELS, seeded()).item() == pytest.approx(9.0)


def test_no_penalty_without_weight_or_after_pruning() -> None:
    dense = unet("unet-tiny", 1, 8)
    for model, weight, expected in ((dense, 0.0, False), (prune(dense, 0.2), 1.0, False), (dense, 1.0, True)):
        penalty = GroupNormPenalty(weight)
        penalty.begin(model, LocalRound(RunConfig(), 1))
        value = penalty.loss(model, IMAGES, LABELS, seeded())
        assert (value.item() > 0) == expected
        assert bool(penalty.end(model, result(), {})) == expected
